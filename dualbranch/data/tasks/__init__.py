"""All tasks. A new one is a file of this folder and an entry of this list (docs/tasks.md)."""

from . import arithmetic, chickens_rabbits, durations, equations, function_call, json_extract, shopping, sorting
from .base import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (arithmetic, chickens_rabbits, shopping, sorting, equations, durations, json_extract, function_call)
}

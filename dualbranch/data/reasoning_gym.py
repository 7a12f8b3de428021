"""Optional source of problems: the `reasoning-gym` package (https://github.com/open-thought/reasoning-gym).

Its problems come without traces and in English only. Nothing else of ours imports this file.
"""

from collections.abc import Iterator

from .problem import Problem


def reasoning_gym_problems(dataset: str, size: int, seed: int = 0, level: str = "medium", **options) -> Iterator[Problem]:
    """`size` problems of one of its datasets ("basic_arithmetic", ...); `options` go to its configuration.

    Deterministic in `seed`. ImportError names the pip command if the package is missing.
    Answers are compared exactly by `verify`; entries without a text answer are left out.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("reasoning_gym_problems needs an optional package: pip install reasoning-gym") from error
    for entry in reasoning_gym.create_dataset(dataset, size=size, seed=seed, **options):
        if isinstance(entry["answer"], str):
            task = f"reasoning_gym/{dataset}"
            yield Problem(task, level, "en", entry["question"], entry["answer"], "", f"{task}|{entry['question']}")

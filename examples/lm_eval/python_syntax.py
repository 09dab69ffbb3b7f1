"""The items of the task python_syntax, from the file next to this one: lm-eval may run in any folder."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def items(**metadata: Any) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_json(str(Path(__file__).with_name("python_syntax.jsonl")))})

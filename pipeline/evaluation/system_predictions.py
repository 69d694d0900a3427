"""What a system wrote for the test prompts, and the files that keep it for the next evaluation of the same run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.evaluation.decodings import DecodedText
from pipeline.evaluation.divergence import SampleMeasure
from pipeline.evaluation.predictions import Prediction
from pipeline.models.text import without_thoughts
from pipeline.runtime.files import write_atomically

Text = TypeVar("Text", Prediction, DecodedText)


@dataclass(frozen=True)
class SystemPredictions:
    """What a system wrote for the N test prompts: predictions; texts by number of beams; samples, those of a prompt
    one after the other. `measures` are of the samples for KL and entropy. `same_weights_as_sft` is True for the SFT
    model, bit for bit, under another name. `is_kept` is True where an earlier evaluation wrote all of this."""

    predictions: list[Prediction]
    beams: dict[int, list[DecodedText]] = field(default_factory=dict)
    samples: list[DecodedText] = field(default_factory=list)
    measures: list[SampleMeasure] = field(default_factory=list)
    same_weights_as_sft: bool = False
    is_kept: bool = False

    def without_thoughts(self) -> "SystemPredictions":
        """Return the same with texts that have no `<think>...</think>` at their start."""

        def strip(texts: Sequence[Text]) -> list[Text]:
            return [replace(text, completion=without_thoughts(text.completion)) for text in texts]

        beams = {number: strip(texts) for number, texts in self.beams.items()}
        return replace(self, predictions=strip(self.predictions), beams=beams, samples=strip(self.samples))


@dataclass(frozen=True)
class KeptPredictions:
    """The files `eval/texts/SYSTEM.KEY.json` of a run, also those of evaluations that were set aside.

    `keys` has, by system, a text that is another one where anything differs that the predictions depend on. A system
    without a key is neither found nor kept.
    """

    run: Path
    keys: Mapping[str, str]

    def find(self, names: Sequence[str]) -> dict[str, SystemPredictions]:
        """Read what is kept of these systems, by system; a file that is not whole counts as missing."""
        read = {name: self._read(name) for name in names}
        whole = {name: predictions for name, predictions in read.items() if predictions is not None}
        for name, predictions in whole.items():
            if not self._file(name).is_file():
                self.keep(name, predictions)  # those of an evaluation that was set aside, which may be deleted
        return whole

    def keep(self, name: str, predictions: SystemPredictions) -> None:
        """Write what a system wrote."""
        if name in self.keys:
            self._file(name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(name), json.dumps(asdict(predictions), ensure_ascii=False))

    def _file(self, name: str) -> Path:
        return self.run / "eval" / "texts" / f"{name}.{self.keys[name]}.json"

    def _read(self, name: str) -> SystemPredictions | None:
        files = self.run.glob(f"eval*/texts/{name}.{self.keys[name]}.json") if name in self.keys else ()
        return next((read for file in files if (read := _read_file(file)) is not None), None)


def _read_file(file: Path) -> SystemPredictions | None:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return SystemPredictions(
            [Prediction(**text) for text in values["predictions"]],
            {int(number): [DecodedText(**text) for text in texts] for number, texts in values["beams"].items()},
            [DecodedText(**text) for text in values["samples"]],
            [SampleMeasure(**measure) for measure in values["measures"]],
            values["same_weights_as_sft"],
            is_kept=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

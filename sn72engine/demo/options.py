"""What the demo works on and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sn72engine.spec import Options, check_choice, check_int


@dataclass(frozen=True, slots=True)
class DemoOptions(Options):
    """Options of :func:`sn72engine.demo.pipeline.run_demo`.

    Args:
        folder: receives report.html, its pictures, results.jsonl, figures.json, the cascade's
            YAML and the ONNX files.
        data: CSV with ``file`` and ``label`` (ImageNet class index) columns. Without it,
            thresholds are chosen by agreement with the larger model on views of photographs.
        calibration: calibration samples.
        evaluation: samples on which thresholds are chosen and figures are taken, half for each.
        target: compute capability of the GPU engines that are built besides; empty for none.
        threads: CPU threads of each engine.
        seed: of the views.
    """

    folder: Path = Path("demo-report")
    data: Path | None = None
    calibration: int = 96
    evaluation: int = 400
    target: str = "sm_89"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("calibration", self.calibration, 8)
        check_int("evaluation", self.evaluation, 100)
        check_int("threads", self.threads, 1)
        check_int("seed", self.seed, 0)
        check_choice("target", self.target, ("", "sm_75", "sm_80", "sm_86", "sm_89", "sm_120"))

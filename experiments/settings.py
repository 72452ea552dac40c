"""All settings of a run: the library's, and a group for each stage with settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.stages.classify import ClassifySettings
from experiments.stages.compress import CompressSettings
from experiments.stages.curves import CurvesSettings
from experiments.stages.decode import DecodeSettings
from experiments.stages.evaluate import EvaluateSettings
from experiments.stages.extract import ExtractSettings
from experiments.stages.generate import GenerateSettings
from experiments.stages.inverse import InverseSettings
from experiments.stages.regress import RegressSettings
from experiments.stages.segment import SegmentSettings
from medfuncta_jax.settings import Settings


@dataclass(frozen=True)
class RunSettings(Settings):
    """The settings in a config: the attributes of `Settings`, and the groups of stages, described in their modules."""

    extract: ExtractSettings = field(default_factory=ExtractSettings)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    curves: CurvesSettings = field(default_factory=CurvesSettings)
    compress: CompressSettings = field(default_factory=CompressSettings)
    classify: ClassifySettings = field(default_factory=ClassifySettings)
    regress: RegressSettings = field(default_factory=RegressSettings)
    inverse: InverseSettings = field(default_factory=InverseSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    segment: SegmentSettings = field(default_factory=SegmentSettings)

"""Studies: what solvers do on the way and what a flow's density looks like, as records and figures."""

from flowprox.studies.contract import Drawn, Study, StudyRun
from flowprox.studies.running import STUDIES, StudyOptions, run_study

__all__ = ["STUDIES", "Drawn", "Study", "StudyOptions", "StudyRun", "run_study"]

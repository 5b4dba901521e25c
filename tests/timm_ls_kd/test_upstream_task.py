"""timm's own tests of its tasks, tests/test_task.py beside its train.py, with LsKdTask in its tasks' place.

Those that ask for the projection of feature distillation are left out: LogitDistillationTask has none either.
"""

import copy
import importlib.util
import inspect
from pathlib import Path

import pytest

from lskd.teachers.frozen import FrozenTeacher, Normalisation
from timm_ls_kd.task import LsKdTask
from timm_runs import SCRIPT

pytestmark = pytest.mark.integration

TESTS = Path(SCRIPT).parent / "tests/test_task.py"
if not (SCRIPT and TESTS.is_file()):
    pytest.skip("TIMM_TRAIN_SCRIPT has no tests/test_task.py beside it", allow_module_level=True)

NORMALISATION = Normalisation((0.5,) * 3, (0.25,) * 3)


def task(student, criterion=None, **options):
    teacher = FrozenTeacher(copy.deepcopy(student), NORMALISATION, NORMALISATION)
    return LsKdTask(student, teacher, criterion=criterion, **options)


spec = importlib.util.spec_from_file_location("timms_test_task", TESTS)
upstream = importlib.util.module_from_spec(spec)
spec.loader.exec_module(upstream)
upstream.ClassificationTask = task

for name, function in vars(upstream).items():
    if name.startswith("test_") and "FeatureDistillationTask" not in inspect.getsource(function):
        globals()[name] = function

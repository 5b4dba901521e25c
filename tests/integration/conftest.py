"""Data that several tests of real commands train on."""

import pytest

from image_folders import write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))

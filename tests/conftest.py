"""The suite runs with and without the compiled kernels; tests that need them are skipped where they are absent."""

from __future__ import annotations

import warnings

from commissure.native import kernels

with warnings.catch_warnings():  # the one warning of a build without them has a test of its own (tests/native)
    warnings.simplefilter("ignore")
    kernels()

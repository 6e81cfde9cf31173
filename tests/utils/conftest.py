import types

import cleanfid.fid
import pytest
import scipy.linalg


@pytest.fixture
def any_scipy(monkeypatch):
    """clean-fid's formula where scipy's sqrtm has lost the argument `disp` that clean-fid passes."""
    def sqrtm(matrix, disp=True):
        root = scipy.linalg.sqrtm(matrix)
        return root if disp else (root, 0.0)

    monkeypatch.setattr(cleanfid.fid, "linalg", types.SimpleNamespace(sqrtm=sqrtm))

"""Serving compiles, writes and starts nothing: every op and every kernel that a Router may pick, on
this GPU, in a process that could not.
"""

from __future__ import annotations

import shutil

import torch

from tests.nojit import fresh


def test_every_op_serves(verification, models, tmp_path):
    done = fresh.run(fresh.make_site(tmp_path / "site", verification.folder), "cuda:0")
    print(fresh.report(done))
    assert done.returncode == 0, fresh.report(done)
    # Each op once for each model; more if the package has more of them.
    assert done.stdout.count("ran dense_router ") == len(models)
    assert done.stdout.count("ran topk_select ") == len(models)


def test_one_kernel_exchanged_for_ptx_fails_it(verification, tmp_path):
    folder = shutil.copytree(verification.folder, tmp_path / "artifacts")
    major, minor = torch.cuda.get_device_capability()
    fresh.exchange_for_ptx(folder, f"sm_{major}{minor}a")
    done = fresh.run(fresh.make_site(tmp_path / "site", folder), "cuda:0")
    assert done.returncode == 1
    assert "expected machine code for" in done.stdout, fresh.report(done)

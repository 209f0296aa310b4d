"""How one machine is shared out, with and without GPUs."""

import pytest

from launch import local
from launch.shares import LaunchSettings, Shares, cores_and_gpus, share_out
from trainer.encoder.gpu_share import GPU_SHARE


@pytest.mark.parametrize(
    ("gpus", "mine_ranks", "plan", "said"),
    [
        ("", 1, Shares(2, 1, 5), "2 trainer ranks, 1 miner rank, 5 threads each"),
        (
            "0",
            1,
            Shares(1, 1, 8, ("0",), ("0",), 0.7, 0.3),
            "1 trainer rank on GPU 0, 1 miner rank on GPU 0, 8 threads each; the miner shares the trainer's GPU, "
            "70% of its memory for a trainer rank, 30% for a miner rank",
        ),
        ("01", 1, Shares(1, 1, 8, ("0",), ("1",)), "1 trainer rank on GPU 0, 1 miner rank on GPU 1, 8 threads each"),
        ("0123", 1, Shares(3, 1, 4, ("0", "1", "2"), ("3",)), "3 trainer ranks on GPU 0,1,2, 1 miner rank on GPU 3"),
        ("0123", 2, Shares(2, 2, 4, ("0", "1"), ("2", "3")), "2 trainer ranks on GPU 0,1, 2 miner ranks on GPU 2,3"),
        ("01", 4, Shares(2, 4, 2, ("0", "1"), ("0", "1"), 0.7, 0.15), "; the miner shares the trainer's GPU"),
    ],
)
def test_a_machine_is_shared_out(gpus, mine_ranks, plan, said):
    found = share_out(LaunchSettings(mine_ranks=mine_ranks), cores=16, gpus=tuple(gpus))
    assert found == plan
    assert said in str(found)


def test_few_cores_leave_one_thread_each():
    assert share_out(LaunchSettings(train_ranks=2), cores=2, gpus=()).threads == 1


def test_the_gpus_that_the_environment_names_are_shared_out(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert cores_and_gpus({"CUDA_VISIBLE_DEVICES": "3, 5"})[1] == ("3", "5")
    assert cores_and_gpus({})[1] == ("0", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cores_and_gpus({"CUDA_VISIBLE_DEVICES": "0"})[1] == ()


def test_a_trainer_alone_has_the_whole_machine():
    found = share_out(LaunchSettings(train_ranks=2), cores=16, gpus=(), mines=False)
    assert found == Shares(2, 0, 8) and str(found) == "2 trainer ranks, 8 threads each"
    assert share_out(LaunchSettings(), cores=16, gpus=("0", "1"), mines=False) == Shares(2, 0, 8, ("0", "1"))


def test_the_memory_of_a_shared_gpu_is_divided_as_the_job_says():
    found = share_out(LaunchSettings(train_memory_share=0.5, mine_ranks=3), cores=8, gpus=("0",))
    assert (found.train_share, found.mine_share) == (0.5, 0.1667)
    alone = share_out(LaunchSettings(train_memory_share=0.5), cores=8, gpus=("0",), mines=False)
    assert (alone.train_share, alone.mine_share) == (1.0, 1.0)


def test_each_side_is_told_its_share_of_a_gpu_that_both_use(tmp_path, monkeypatch):
    monkeypatch.setenv(GPU_SHARE, "0.1")  # of another run, which started this one
    monkeypatch.setattr(local, "mpi_command", lambda num_ranks: [])
    trainer, miner = local.sides(tmp_path, tmp_path / "job.toml", share_out(LaunchSettings(), cores=8, gpus=("0",)))
    assert (trainer.env[GPU_SHARE], miner.env[GPU_SHARE]) == ("0.7", "0.3")
    trainer, miner = local.sides(tmp_path, tmp_path / "job.toml", share_out(LaunchSettings(), cores=8, gpus=("0", "1")))
    assert GPU_SHARE not in trainer.env and GPU_SHARE not in miner.env

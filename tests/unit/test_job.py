"""Which rank a process is, read from the environments that torchrun and Slurm set."""

import pytest

from shardwright.comm.job import Job, Source, first_node, found_job
from shardwright.errors import RunError

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "10",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_TASKS_PER_NODE": "4(x2),2",
    "SLURM_JOB_NODELIST": "gpu[07-09,12],login1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


def test_backends() -> None:
    assert Job(1, "program").resolved_backend == "gloo"
    assert Job(1, "program", device="cuda").resolved_backend == "nccl"
    assert Job(4, "program", device="cuda", backend="gloo").resolved_backend == "gloo"
    with pytest.raises(RunError) as caught:
        _ = Job(4, "program", backend="nccl").resolved_backend
    assert str(caught.value) == "run.backend: nccl moves the memory of GPUs, and the 4 ranks run on cpu\n" + (
        '  what works: run.backend = "auto" or "gloo", or run.device = "cuda"'
    )


def test_nobody_started_this_process() -> None:
    assert found_job({}) is None


def test_torchrun() -> None:
    place = found_job(TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert place is not None
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (3, 1, 4, 2)
    assert (place.address, place.port, place.source, place.hosts_store) == ("node", 29500, Source.TORCHRUN, False)


def test_rank_zero_hosts_the_store_where_no_agent_does() -> None:
    place = found_job(TORCHRUN | {"RANK": "0"})
    assert place is not None and place.hosts_store


def test_incomplete_environment_is_refused() -> None:
    with pytest.raises(RunError, match="MASTER_PORT: not set"):
        found_job({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"})
    with pytest.raises(RunError, match="RANK: 'x' is not a number"):
        found_job(TORCHRUN | {"RANK": "x"})


def test_srun() -> None:
    place = found_job(STEP)
    assert place is not None
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (9, 1, 10, 2)
    assert (place.address, place.port, place.source) == ("gpu07", 16711, Source.SRUN)


def test_given_address_and_port_win_under_srun() -> None:
    place = found_job(STEP | {"MASTER_ADDR": "there", "MASTER_PORT": "5"})
    assert place is not None and (place.address, place.port) == ("there", 5)


def test_two_steps_of_a_job_do_not_meet() -> None:
    ports = {found_job(STEP | {"SLURM_STEP_ID": str(step)}).port for step in range(20)}  # type: ignore[union-attr]
    assert len(ports) == 20


def test_batch_script_and_single_task_start_their_own_ranks() -> None:
    batch = {name: value for name, value in STEP.items() if "STEP" not in name} | {"ENVIRONMENT": "BATCH"}
    assert found_job(batch | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None
    assert found_job(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("gpu[07-09,12],login1", "gpu07"), ("a,b", "a"), ("r[1-2]n[3,5]", "r1n3"), ("n-1.x", "n-1.x")],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first

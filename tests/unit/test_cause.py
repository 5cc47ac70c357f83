"""Of several ranks' failures, the first that is no echo of another is the one to tell."""

from shardwright.comm.cause import Cause, Kind, first_cause, is_echo
from shardwright.errors import RunError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7700"


def test_an_echo_is_told_only_where_there_is_nothing_else() -> None:
    echo = Cause(0, Kind.ECHO, 1.0, "Connection closed by peer")
    condition, defect = Cause(1, Kind.CONDITION, 2.0, "the condition"), Cause(2, Kind.EXCEPTION, 3.0, "a defect")
    assert first_cause([echo, defect, condition]) is condition
    assert first_cause([echo]) is echo
    assert "no rank told why" in echo.told()
    assert first_cause([]) is None


def test_echoes_are_known_by_what_gloo_nccl_and_the_store_say() -> None:
    assert is_echo(RuntimeError(GLOO))
    assert is_echo(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not is_echo(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    # a user's own connection, to a file server say, is no rank's
    assert not is_echo(ConnectionResetError("Connection reset by peer"))


def test_an_exception_on_the_way_out_of_an_echo_is_an_echo() -> None:
    try:
        try:
            raise RuntimeError(GLOO)
        finally:
            raise KeyError("cleaning up")
    except KeyError as error:
        assert Cause.of_exception(0, error).kind is Kind.ECHO


def test_texts() -> None:
    assert Cause.of_exception(1, RunError("what", "way out")).told() == "what\n  way out"
    assert Cause.of_exception(1, SystemExit(3)).told() == "rank 1 left with exit code 3"
    assert Cause.of_exit(1, -11, out_of_memory=False).told() == "rank 1 was killed by signal 11 (SIGSEGV)"
    assert "memory ran out and the kernel killed it" in Cause.of_exit(1, -9, out_of_memory=True).told()


def test_a_cause_survives_its_file() -> None:
    cause = Cause.of_exit(1, 3, out_of_memory=False)
    assert Cause.from_json(cause.to_json()) == cause

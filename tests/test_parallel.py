import numpy as np
import pytest

import parallel_suite
import split_invariance
from distprop import functional as F
from distprop import nn, optim, random
from distprop.buffer import LANE_LENGTH
from distprop.comm import CollectiveError, SoloCommunicator, run_threads
from distprop.data import Loader
from distprop.lane import ScheduleError, read_lane, write_lane
from distprop.parallel import DataParallel
from distprop.tensor import Parameter
from parallel_suite import make_model, rows
from scenario import run
from split_invariance import CASES, SEED, STEPS, make_optimizer, train_in_a_loop


@pytest.mark.parametrize(("scenario", "size"), split_invariance.suite.in_threads((1, 2, 3, 4, 5)))
def test_any_split_makes_the_parameters_of_one_process(scenario, size):
    run(scenario, size)


@pytest.mark.parametrize(("scenario", "size"), parallel_suite.suite.in_threads((1, 2, 3, 5)))
def test_parallel(scenario, size):
    run(scenario, size)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_any_split_makes_the_parameters_of_pytorch(size):
    torch = pytest.importorskip("torch")
    case = CASES["uneven_shards"]
    model = case.build(seed=0)
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    theirs.load_state_dict({name: torch.tensor(value) for name, value in model.state_dict().items()})
    options = make_optimizer(model).param_groups[0]
    optimizer = torch.optim.SGD(theirs.parameters(), **{n: options[n] for n in ("lr", "momentum", "weight_decay")})
    loader = Loader(case.data(), batch_size=case.batch_size, seed=SEED)
    for step in range(STEPS):
        if step % len(loader) == 0:
            batches = iter(loader)
        x, y = next(batches)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(theirs(torch.tensor(x)), torch.tensor(y)).backward()
        optimizer.step()

    def train(comm):
        ours = case.build(seed=comm.rank)
        train_in_a_loop(case, ours, comm)
        return ours.state_dict()

    for state in run_threads(size, train):
        for name, value in theirs.state_dict().items():
            np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-12, atol=1e-12, err_msg=name)


def test_world_is_the_default():
    parallel = DataParallel(make_model())
    assert isinstance(parallel.comm, SoloCommunicator)
    F.mse_loss(parallel(rows(2)[0]), rows(2)[1]).backward()


def test_it_says_how_gradients_are_summed(capsys):
    def how(comm, **options):
        return DataParallel(make_model(), comm, **options).reduction

    def cramped(comm):
        comm.node.allocate = lambda *arguments: None
        return how(comm)

    assert how(SoloCommunicator()) == "nothing to sum"
    assert run_threads(2, how) == ["one message"] * 2
    assert run_threads(2, lambda comm: how(comm, wire="bf16")) == ["one message, bf16"] * 2
    assert run_threads(2, how, share_memory=True) == ["shared memory"] * 2
    shared = run_threads(3, lambda comm: how(comm, shards=4), share_memory=True)
    assert shared == ["shared memory, a fixed tree of 4 shards"] * 3
    assert capsys.readouterr().err == ""
    assert run_threads(2, cramped, share_memory=True) == ["one message"] * 2
    assert capsys.readouterr().err.count("no room for the gradients in shared memory; they are summed by messages") == 1


def test_a_parameter_without_gradient_is_named_once_by_rank_0():
    def three_steps(comm):
        case = CASES["a_parameter_without_gradient"]
        model = case.build(seed=0)
        parallel = DataParallel(model, comm)
        x, y = case.data().arrays
        for _ in range(3):
            model.zero_grad()
            F.mse_loss(parallel(x), y).backward()

    with pytest.warns(UserWarning, match=r"no gradient reached after, before\.weight, before\.bias;") as caught:
        run_threads(3, three_steps)
    assert len(caught) == 1


def changed(change, late):
    """Three steps of a model that is changed after DataParallel was made, at once or after the first step."""

    def train(comm):
        model = make_model()
        parallel = DataParallel(model, comm, verify_every=3)
        x, y = rows(2)
        for step in range(1, 6):
            if step == (2 if late else 1):
                change(model)
            model.zero_grad()
            F.mse_loss(parallel(x), y).backward()

    return train


@pytest.mark.filterwarnings("ignore:no gradient reached")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.append(nn.Linear(2, 2).double()), r"3\.weight and 3\.bias came after"),
        (lambda model: setattr(model[0], "weight", Parameter(model[0].weight.data)), r"0\.weight came, 0\.weight went"),
        (
            lambda model: model.__setitem__(0, nn.Linear(4, 6, False).double()),
            r"weight came, 0\.weight and 0\.bias went",
        ),
    ],
)
def test_parameters_that_come_or_go_later_are_refused(change, message, late):
    with pytest.raises(RuntimeError, match=f"{message}.*DataParallel was made; make it anew"):
        run_threads(2, changed(change, late))


def test_parameters_of_16_bits_are_refused_for_no_count_of_examples_fits_beside_their_gradients():
    with pytest.raises(
        TypeError, match=r"0\.weight is float16; gradients are summed in float32 or float64.*\.float\(\)"
    ):
        DataParallel(make_model().to(np.float16))


def two_optimizers(comm, wrong):
    """Three steps, of which the last two go `wrong`; the mean gradient and one of each rank differ."""
    model = make_model()
    parallel = DataParallel(model, comm)
    first, *others = model.parameters()
    optimizers = [optim.SGD([first], lr=0.1), optim.SGD(others, lr=0.1)]
    x, y = rows(2)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with parallel.no_sync():
            F.mse_loss(parallel(x), y).backward()
        if wrong is None or step == 0:
            F.mse_loss(parallel(x + comm.rank), y).backward()
        elif wrong == "model":
            F.mse_loss(model(x + comm.rank), y).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("wrong", ["model", "no_sync"])
def test_steps_with_the_gradients_of_one_rank_are_said_once_by_rank_0(wrong):
    with pytest.warns(UserWarning, match=r"gradients of this rank alone.*in place of the model inside it") as caught:
        run_threads(2, lambda comm: two_optimizers(comm, wrong))
    assert len(caught) == 2  # one by each optimizer


@pytest.mark.filterwarnings("error")
def test_steps_with_the_mean_gradient_are_passed_over_in_silence():
    for size in (1, 2):
        run_threads(size, lambda comm: two_optimizers(comm, wrong=None))
    two_optimizers(SoloCommunicator(), wrong="model")


def dropped_out(comm, said):
    """What 2 rows of ones become on each rank, in two steps."""
    parallel = DataParallel(nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5)), comm)
    masks = []
    for step in range(2):
        if said:
            random.at(SEED, step, 2 * comm.rank)
        masks.append(parallel(np.ones((2, 1), np.float32)).data != 0)
    return np.concatenate(masks)


def test_equal_masks_on_all_ranks_are_said_once_by_rank_0():
    with pytest.warns(UserWarning, match=r"every rank drops out as if .*distprop\.random\.at\(seed, step,") as caught:
        first, second, _ = run_threads(3, lambda comm: dropped_out(comm, said=False))
    assert len(caught) == 1
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("size", "said"), [(1, False), (3, True)])
def test_masks_that_differ_are_no_reason_to_warn(size, said):
    masks = run_threads(size, lambda comm: dropped_out(comm, said))  # pytest makes a warning an error
    assert all((masks[0] != other).any() for other in masks[1:])


@pytest.mark.parametrize("places", [[(3, 1), (4, 1)], [(3, 1), (3, 2)], [(3, 1), (4, 1), (5, 1)]])
def test_ranks_at_different_reductions_or_passes_are_told_so(places):
    """Such as those of two models of one size, that one rank trains the other way round."""
    total = np.zeros(LANE_LENGTH, np.float32)
    for reductions, backwards in places:
        lane = np.zeros_like(total)
        write_lane(lane, 2, backwards, reductions, len(places), {})
        total += lane
    with pytest.raises(ScheduleError, match="do all ranks make the same number of steps"):
        read_lane(total, len(places), [])


def test_a_batch_without_examples_is_no_reason_to_warn():
    def empty_step(comm):
        parallel = DataParallel(make_model(), comm)
        x, y = rows(0 if comm.rank == 0 else 2)
        F.mse_loss(parallel(x), y).backward()

    run_threads(2, empty_step)  # pytest makes a warning an error


def test_a_rank_that_raises_between_forward_and_backward_stops_the_others():
    def raise_on_one(comm):
        parallel = DataParallel(make_model(), comm)
        x, y = rows(3)
        loss = F.mse_loss(parallel(x), y)
        if comm.rank == 1:
            raise KeyError("a bad record")
        with pytest.raises(CollectiveError, match="a bad record"):
            loss.backward()

    with pytest.raises(KeyError, match="a bad record"):
        run_threads(3, raise_on_one, timeout_seconds=20)

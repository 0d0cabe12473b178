"""The examples: some steps of every architecture; both models stay together. No timing is asserted."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyext

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--steps", "3", "--batch", "2", "--layers", "2", "--width", "32", "--heads", "4", "--threads", "1"]
SMALL = [*TINY, "--length", "48"]


def module_of(name: str):
    """An example as a module; what it imports from beside itself is found as when it is run."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def shared():
    return module_of("side_by_side")


@pytest.fixture(scope="module")
def example():
    return module_of("train_lm")


@pytest.fixture(scope="module")
def parallel():
    return module_of("train_parallel")


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["t5", "bloom", "gpt2", "bert"])
def test_three_steps(example, shared, arch, dtype, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    runs = example.main([*SMALL, "--arch", arch, "--dtype", dtype, "--out", str(picture)])
    assert [run.name for run in runs] == ["pyext", "PyTorch"]
    assert all(len(run.losses) == 3 for run in runs)
    largest, mean = shared.apart(runs)
    assert mean <= largest <= (1e-4 if dtype == "fp32" else 5e-2)
    assert all(4 < run.losses[0] < 8 for run in runs)  # log 258 = 5.55: nothing has been learned yet
    assert runs[0].losses[-1] < runs[0].losses[0]
    assert abs(runs[0].validation - runs[1].validation) <= (1e-4 if dtype == "fp32" else 5e-2)
    assert 0 < picture.stat().st_size < 150_000
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "apart at most" in printed


def test_gradients_reach_t5_tables(example, shared):
    config = example.Config("t5", layers=2, width=32, heads=4, length=40)
    torch.manual_seed(1)
    batch = next(example.batches(torch.arange(1000) % 256, config, 2, seed=3))
    attends = example.PyextAttention(), example.TorchAttention()
    for run in shared.make_runs(shared.attending(example.Model(config, attends[0]), attends), 1e-3, compiled=False):
        run.model(batch).backward()
        for stack in (run.model.encoder, run.model.stack):
            assert stack.table.grad.abs().max() > 0


def test_batches_repeat_and_hide(example):
    text = torch.arange(5000) % 256
    for arch in ("t5", "bert"):
        config = example.Config(arch, 1, 8, 1, 64)
        first, again = (next(example.batches(text, config, 3, seed=7)) for _ in range(2))
        assert torch.equal(first.inputs, again.inputs)
        assert torch.equal(first.targets, again.targets)
    assert first.lengths[0] == 64
    padding = torch.arange(64) >= first.lengths[:, None]
    assert (first.inputs[padding] == example.PAD).all()
    assert (first.targets[padding] == example.IGNORE).all()
    config = example.Config("t5", 1, 8, 1, 64)
    batch = next(example.batches(text, config, 3, seed=7))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert torch.equal((batch.before[:, -1] + 1) % 256, batch.targets[:, 0])
    assert batch.tokens == 2 * 3 * 64


def test_corpus_is_python(shared):
    train, held_out = shared.corpus()
    assert len(train) > 10 * len(held_out) > 100_000
    assert b"import " in bytes(train[:100_000].to(torch.uint8).tolist())


@pytest.mark.parametrize("bad", [["--width", "30"], ["--steps", "-1"], ["--arch", "rnn"]])
def test_bad_arguments(example, bad, capsys):
    with pytest.raises(SystemExit):
        example.main([*SMALL, *bad])
    assert bad[0] in capsys.readouterr().err


def test_text_too_short(example):
    config = example.Config("gpt2", 1, 8, 1, 64)
    with pytest.raises(ValueError, match="--length"):
        next(example.batches(torch.zeros(64, dtype=torch.long), config, 1, 0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name, options", [("xlnet", ["--length", "48"]), ("dalle", ["--side", "14"])])
def test_the_other_examples(shared, name, options, dtype, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    runs = module_of(name).main([*TINY, *options, "--dtype", dtype, "--out", str(picture)])
    assert [run.name for run in runs] == ["pyext", "PyTorch"]
    largest, mean = shared.apart(runs)
    limit = 1e-4 if dtype == "fp32" else 5e-2
    assert mean <= largest <= limit and abs(runs[0].validation - runs[1].validation) <= limit
    assert all(4 < run.losses[0] < 8 and len(run.losses) == 3 for run in runs)
    assert 0 < picture.stat().st_size < 150_000 and "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["xlnet", "dalle"])
def test_gradients_agree(shared, name):
    """Of every parameter, in fp64 and with more than one batch row."""
    module = module_of(name)
    torch.manual_seed(1)
    if name == "xlnet":
        config = module.Config(layers=2, width=16, heads=2, length=30)
        batch = next(module.batches(torch.arange(1000) % 256, config, 2, seed=3))
    else:
        config = module.Config(layers=3, width=16, heads=2, side=13)
        batch = next(module.batches(13, 2, seed=3))
    attends = module.PyextAttention(), module.TorchAttention()
    model = module.Model(config, attends[0]).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gradients = []
    for run in shared.make_runs(shared.attending(model, attends), 1e-3, compiled=False):
        run.model(batch).backward()
        gradients.append({key: p.grad for key, p in run.model.named_parameters()})
    for key, wanted in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], wanted, rtol=1e-6, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


def test_images_are_what_their_captions_say():
    dalle = module_of("dalle")
    tokens = next(dalle.batches(20, 3, seed=5)).tokens_in_order
    for row in tokens:
        caption = bytes(row[: dalle.TEXT].tolist()).decode().rstrip()
        figures, _, ground = caption.rpartition(" on ")
        image = [dalle.COLOURS[token - 256] for token in row[dalle.TEXT :].tolist()]
        named = {figure.split()[0] for figure in figures.split(", ")} | {ground}
        assert set(image) == named and image[0] == ground


@pytest.mark.parametrize(
    "name, bad",
    [
        ("xlnet", ["--length", "3"]),
        ("dalle", ["--side", "0"]),
        ("generate", ["--tokens", "0"]),
        ("generate", ["--heads", "32"]),
        ("pretrain_deberta", ["--version", "2"]),
        ("pretrain_deberta", ["--dtype", "bf16", "--version", "1"]),
    ],
)
def test_bad_sizes(name, bad, capsys):
    if name not in ("xlnet", "dalle"):
        pytest.importorskip("transformers", minversion="5")
    with pytest.raises(SystemExit):
        module_of(name).main([*TINY, *bad])
    assert bad[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options, dtype",
    [
        ("pretrain_deberta", ["--version", "3"], "fp32"),
        ("pretrain_deberta", ["--version", "3"], "bf16"),
        ("pretrain_deberta", ["--version", "1"], "fp32"),
        ("finetune_t5", [], "fp32"),
        ("finetune_t5", [], "bf16"),
    ],
)
def test_whole_models(shared, name, options, dtype, tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5")
    if name == "finetune_t5":
        pytest.importorskip("accelerate")
    picture = tmp_path / "curves.png"
    runs = module_of(name).main([*SMALL, *options, "--dtype", dtype, "--out", str(picture)])
    assert [run.name for run in runs] == ["pyext", "Transformers"]
    largest, mean = shared.apart(runs)
    limit = 1e-4 if dtype == "fp32" else 5e-2
    assert mean <= largest <= limit and abs(runs[0].validation - runs[1].validation) <= limit
    assert all(4 < run.losses[0] < 8 and len(run.losses) == len(run.rates) == 3 for run in runs)
    printed = capsys.readouterr().out
    assert "left as it was: nothing" in printed and "times as fast as Transformers" in printed
    assert 0 < picture.stat().st_size < 150_000


def test_fine_tuning_begins_with_a_model_on_disk(tmp_path, capsys):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = dict(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, dropout_rate=0.5)).save_pretrained(tmp_path)
    arguments = [*SMALL, "--model", str(tmp_path), "--out", str(tmp_path / "curves.png")]
    runs = module_of("finetune_t5").main(arguments)
    assert f"{tmp_path}, 48 bytes" in capsys.readouterr().out
    assert all(abs(a - b) <= 1e-4 for a, b in zip(runs[0].losses, runs[1].losses))  # no dropout left


def test_continuations_follow():
    pytest.importorskip("accelerate")
    pairs = module_of("finetune_t5").Continuations(torch.arange(200), length=8, count=5)
    assert len(pairs) == 5
    for pair in (pairs[n] for n in range(5)):
        assert torch.equal(torch.cat(list(pair.values())), torch.arange(16) + pair["input_ids"][0])
    assert pairs[0]["input_ids"][0] == 3 and pairs[4]["labels"][-1] == 3 + 191


def test_generation(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5")
    module, picture = module_of("generate"), tmp_path / "speeds.png"
    rows = module.main([*TINY, "--prompt", "40", "--tokens", "6", "--rounds", "1", "--out", str(picture)])
    assert {(row.arch, row.search, row.cache) for row in rows} == {
        (arch, search, cache) for arch in module.THEIRS for search in module.SEARCHES for cache in module.CACHES
    }
    for row in rows:
        assert set(row.seconds) == {"pyext", *module.THEIRS[row.arch]} and row.speed("pyext") > 0
        assert row.equal == row.written["pyext"].numel() == 12
    assert capsys.readouterr().out.count("12 of 12") == len(rows)
    assert 0 < picture.stat().st_size < 150_000


FEW = ["--steps", "3", "--length", "64", "--width", "32", "--batch", "3", "--experts", "5"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_parallel_started_by_torchrun(tmp_path):
    """Random second choices, dropped tokens, experts that two processes cannot share evenly."""
    picture = tmp_path / "curves.png"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--quick", *FEW, "--moe", "gshard", "--out", picture]
    env = dict(os.environ, PYTHONPATH=str(Path(pyext.__file__).parents[1]), OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [*command, EXAMPLES / "train_parallel.py", *arguments], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and "apart at most, over 3 steps" in done.stdout
    assert 0 < picture.stat().st_size < 150_000


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed")
@pytest.mark.parametrize("mixture", ["mixtral", "switch"])
def test_parallel_by_itself(parallel, shared, mixture, tmp_path):
    runs = parallel.main([*FEW, "--moe", mixture, "--out", str(tmp_path / "curves.png")])
    assert [len(run.losses) for run in runs] == [3, 3] and runs[1].losses[-1] < runs[1].losses[0]
    assert shared.apart(runs)[0] < 1e-4


def test_parallel_bad_arguments(parallel, capsys):
    for bad in (["--width", "30"], ["--moe", "soft"], ["--experts", "-1"]):
        with pytest.raises(SystemExit):
            parallel.parse([*FEW, *bad])
        assert bad[0] in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--length must be a multiple of 2 for 1 process"):
        parallel.main([*FEW, "--length", "63"])

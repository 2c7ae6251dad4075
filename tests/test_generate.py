"""Generation for FID: the same bytes from any number of processes and after any kill, and nothing half-made in sight."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit import sample_ddp, sample_ddp_t_stitch
from dit.checkpoints import load_denoisers
from tstitch import generate
from tstitch.autoencoder import Autoencoder
from tstitch.cli import run, sampling_plan, stitched_files
from tstitch.errors import InputError
from tstitch.files import alone_in
from tstitch.noise import SampleNoise
from tstitch.presets import ROOT
from tstitch.sampling import sample
from tstitch.schedule import StitchSchedule

SCRIPT = str(ROOT / "dit" / "sample_ddp_t_stitch.py")
QUICK = ["--preset", "emoji", "--num-sampling-steps", "3", "--device", "cpu"]
SWEEP = [*QUICK, "--ratios", "0", "0.5", "1", "--num-fid-samples", "13", "--per-proc-batch-size", "2"]
TINY = [*QUICK, "--ratios", "0.5", "--num-fid-samples", "3", "--per-proc-batch-size", "1"]


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """The scripts settle threads and TF32 for their process; other tests have their own."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep by one rank, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    sample_ddp_t_stitch.main([*SWEEP, "--sample-dir", str(folder)])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder: Path, name: str) -> np.ndarray:
    with np.load(folder / f"{name}.npz") as archive:
        return archive["arr_0"]


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, at_call: int) -> None:
    """Let a function be called at_call times, then cut the run off there."""
    function, calls = getattr(owner, name), []

    def cut_off(*arguments):
        calls.append(1)
        if len(calls) > at_call:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(owner, name, cut_off)


def test_three_ranks_write_the_bytes_of_one(whole: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    subprocess.run([*launch, SCRIPT, *SWEEP, "--sample-dir", str(tmp_path / "sweep")], check=True, capture_output=True, timeout=300)
    assert contents(tmp_path / "sweep") == contents(whole)


def test_a_sweep_killed_twice_ends_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    marks = folder / "work" / "done"

    def done() -> int:
        return len(list(marks.glob("*")))

    for enough in (2, 4):
        process = subprocess.Popen([sys.executable, SCRIPT, *SWEEP, "--sample-dir", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while done() < enough:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.002)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert enough <= done() < 7
        assert not list(folder.glob("[!.]*.npz"))
    sample_ddp_t_stitch.main([*SWEEP, "--sample-dir", str(folder)])
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_sweep_cut_off_in_sampling_and_in_writing_shows_whole_files_only(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(name: str) -> Path:
        sample_ddp_t_stitch.main([*SWEEP, "--num-fid-samples", "5", "--device", device, "--sample-dir", str(tmp_path / name)])
        return tmp_path / name

    undisturbed = contents(sweep("undisturbed"))
    for owner, function, at_call, visible in ((generate, "walk", 1, 0), (generate.SampleFolder, "write", 1, 0), (shutil, "copyfileobj", 1, 1)):
        with monkeypatch.context() as patch:
            interrupt(patch, owner, function, at_call)
            with pytest.raises(KeyboardInterrupt):
                sweep("cut")
        finished = {path.name: path.read_bytes() for path in (tmp_path / "cut").glob("*.npz")}
        assert len(finished) == visible and finished.items() <= undisturbed.items()
    (tmp_path / "cut" / ".ratio_1.00.123.tmp.npz").write_bytes(b"left by a kill")
    others = [tmp_path / "cut" / "sub" / ".notes.1.tmp.txt", tmp_path / "cut" / ".notes.1.tmp.txt"]
    others[0].parent.mkdir()
    for path in others:
        path.write_text("somebody's own")
    sweep("cut")
    for path in others:
        path.unlink()
    others[0].parent.rmdir()
    assert contents(tmp_path / "cut") == undisturbed


def test_a_second_run_is_kept_out_of_a_folder_that_is_being_filled(tmp_path: Path) -> None:
    with alone_in(tmp_path / "sweep"):
        with pytest.raises(InputError, match="another run is filling"):
            sample_ddp_t_stitch.main([*TINY, "--sample-dir", str(tmp_path / "sweep")])
        (tmp_path / "sweep" / "config.json").write_text("{}")  # of another sweep: nobody is told to remove it now
        with pytest.raises(InputError, match="another run is filling"):
            sample_ddp_t_stitch.main([*TINY, "--sample-dir", str(tmp_path / "sweep")])
        (tmp_path / "sweep" / "config.json").unlink()
        assert not list((tmp_path / "sweep").iterdir())
    sample_ddp_t_stitch.main([*TINY, "--sample-dir", str(tmp_path / "sweep")])


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*TINY, "--sample-dir", str(tmp_path / "sweep")]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_for_the_writer(file: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            full()

    for where, disk in (("os.fsync", full), ("os.fsync", full_for_the_writer), ("shutil.copyfileobj", full)):
        with monkeypatch.context() as patch:
            patch.setattr(f"tstitch.sample_folder.{where}", disk)
            with pytest.raises(InputError, match=r"No space left on device\); mend that and run again"):
                sample_ddp_t_stitch.main(command)
        assert not list((tmp_path / "sweep").glob("[!.]*.npz"))
    sample_ddp_t_stitch.main(command)
    assert list((tmp_path / "sweep").glob("*.npz"))


def test_pictures_are_the_same_whether_they_are_decoded_beside_the_sampling_or_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, decoded_in = Autoencoder.decode, []
    monkeypatch.setattr(Autoencoder, "decode", lambda self, x: decoded_in.append(threading.current_thread() is threading.main_thread()) or decode(self, x))
    for cores in (0, 1):
        monkeypatch.setattr(generate, "free_cores", lambda cores=cores: cores)
        sample_ddp_t_stitch.main([*TINY, "--sample-dir", str(tmp_path / str(cores))])
    assert decoded_in == [True] * 3 + [False] * 3
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


class Nothing:
    """A denoiser that computes nothing."""

    latent_shape = (3, 4, 4)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def sweep_of_nothing(folder: Path, count: int, denoiser: Callable = Nothing) -> float | None:
    """Generate pictures of 4x4 pixels, in chunks of 10; the share of the time for which the device was busy."""
    words = ["--preset", "emoji", "--vae", "none", "--image-size", "4", "--cfg-scale", "1", "--num-sampling-steps", "2", "--device", "cpu", "--ratios", "0.5"]
    args = sample_ddp_t_stitch.parse_args([*words, "--num-fid-samples", str(count), "--per-proc-batch-size", "10", "--sample-dir", str(folder)])
    plan = sampling_plan(args, fid=True)
    files = stitched_files(args, plan, three=False)
    schedules = generate.file_names(sample_ddp_t_stitch.choose_schedules(args), files)
    return generate.generate(generate.Ranks(0, 1), args, plan, files, schedules, lambda plan, files: [denoiser(), denoiser()])


def test_memory_grows_by_no_more_than_a_seed_a_label_and_a_mark_for_each_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, latents, alive, walk = [], [], [], generate.walk

    def watched(*arguments):
        alive.append(sum(latent() is not None for latent in latents))
        walked = walk(*arguments)
        latents.extend(weakref.ref(latent) for latent in walked.latents)
        return walked

    monkeypatch.setattr(generate, "walk", watched)
    for count in (100, 2000):
        tracemalloc.start()
        sweep_of_nothing(tmp_path / str(count), count)
        peaks.append(tracemalloc.get_traced_memory()[1])  # of Python and numpy
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 100 * 1900  # bytes
    assert max(alive) <= generate.WAITING_CHUNKS + 1  # torch's


def test_a_chunk_costs_the_same_in_a_long_run_as_in_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, exists, listed, glob = [], Path.exists, [], Path.glob
    monkeypatch.setattr(Path, "exists", lambda self, **k: (self.parent.name == "done" and looks.append(self)) or exists(self, **k))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: (self.name == "done" and listed.append(self)) or glob(self, pattern))
    for chunks in (5, 50):
        looks.clear()
        listed.clear()
        sweep_of_nothing(tmp_path / str(chunks), 10 * chunks)
        assert len(looks) <= 2 * chunks + 20  # one finds the mark, one that it is not there yet; a few while the last ones are written
        assert len(listed) <= 1


def test_the_share_of_the_time_that_the_device_was_busy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Slow(Nothing):
        def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return super().__call__(x, t, y)

    write = generate.SampleFolder.write
    monkeypatch.setattr(generate.SampleFolder, "write", lambda self, *chunk: time.sleep(0.05) or write(self, *chunk))
    beside = sweep_of_nothing(tmp_path / "beside", 100, Slow)  # 2 steps of 0.05 s, and then 0.05 s of writing
    assert f"device busy for at most {beside:.3f} of the time" in capsys.readouterr().out
    assert 0.8 < beside < 1.0  # all but the last chunk's writing
    monkeypatch.setattr(generate, "WAITING_CHUNKS", 0)
    assert sweep_of_nothing(tmp_path / "waiting", 100, Slow) < 0.75  # 0.1 of 0.15 s
    assert sweep_of_nothing(tmp_path / "waiting", 100, Slow) is None  # nothing left to do


def test_what_was_done_before_a_kill_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, generate, "walk", 2)
        with pytest.raises(KeyboardInterrupt):
            sample_ddp_t_stitch.main([*TINY, "--sample-dir", str(tmp_path)])
    walked, walk = [], generate.walk
    monkeypatch.setattr(generate, "walk", lambda *arguments: (walked.append(arguments[-2:]), walk(*arguments))[1])
    sample_ddp_t_stitch.main([*TINY, "--sample-dir", str(tmp_path)])
    assert walked == [(2, 3)]


def test_a_finished_sweep_is_left_alone(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    monkeypatch.setattr(sample_ddp_t_stitch, "load_denoisers", None)  # nothing is loaded
    start = time.monotonic()
    sample_ddp_t_stitch.main([*SWEEP, "--sample-dir", str(whole)])
    assert time.monotonic() - start < 2
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_deleted_file_is_made_again_and_the_others_stay(tmp_path: Path) -> None:
    arguments = [*TINY, "--ratios", "0", "1", "--sample-dir", str(tmp_path)]
    sample_ddp_t_stitch.main(arguments)
    before, kept = contents(tmp_path), (tmp_path / "ratio_1.00.npz").stat().st_mtime_ns
    (tmp_path / "ratio_0.00.npz").unlink()
    sample_ddp_t_stitch.main(arguments)
    assert contents(tmp_path) == before and (tmp_path / "ratio_1.00.npz").stat().st_mtime_ns == kept


def test_a_sweep_holds_the_pictures_that_sample_makes(whole: Path) -> None:
    args = sample_ddp_t_stitch.parse_args([*SWEEP, "--num-fid-samples", "4"])
    plan = sampling_plan(args, fid=True)
    denoisers, autoencoder = load_denoisers(plan, stitched_files(args, plan, three=False)), Autoencoder(plan.vae)
    x_T = plan.noise.latents(denoisers[0].latent_shape)
    pictures = []
    for ratio in (0.0, 0.5, 1.0):
        latents = sample(denoisers, x_T, plan.labels, schedule=StitchSchedule.from_ratio(ratio), solver=plan.solver, guidance=plan.guidance)
        expected = autoencoder.decode(latents).permute(0, 2, 3, 1).numpy()
        pictures.append(images(whole, f"ratio_{ratio:.2f}"))
        assert pictures[-1].shape == (13, 64, 64, 3) and pictures[-1].dtype == np.uint8
        assert np.abs(pictures[-1][:4].astype(int) - expected).max() <= 1
    assert np.abs(pictures[0].astype(int) - pictures[2]).max() > 20


def test_one_model_makes_what_it_makes_in_a_sweep(whole: Path, tmp_path: Path) -> None:
    sample_ddp.main([*QUICK, "--solver", "ddim", "--num-fid-samples", "4", "--per-proc-batch-size", "2", "--sample-dir", str(tmp_path)])
    difference = images(tmp_path, "emoji-large").astype(int) - images(whole, "ratio_0.00")[:4]
    assert np.abs(difference).max() <= 1
    record = json.loads((tmp_path / "emoji-large.json").read_text())
    assert record["name"] == "L:100" and record["settings"]["solver"] == "DDIM"


def test_a_picture_and_its_label_depend_on_their_own_seed_alone(tmp_path: Path) -> None:
    def make(name: str, *arguments: str) -> np.ndarray:
        sample_ddp_t_stitch.main([*TINY, *arguments, "--solver", "ddpm", "--sample-dir", str(tmp_path / name)])
        return images(tmp_path / name, "ratio_0.50")

    def labels(seed: int, count: int) -> list[int]:
        args = sample_ddp_t_stitch.parse_args([*TINY, "--global-seed", str(seed), "--num-fid-samples", str(count)])
        return sampling_plan(args, fid=True).labels.tolist()

    four, five = make("four", "--global-seed", "4"), make("five", "--global-seed", "5", "--num-fid-samples", "2")
    assert np.array_equal(four[1:], five)
    assert labels(4, 50)[1:] == labels(5, 49) == SampleNoise(range(5, 54)).labels(9).tolist()
    assert set(labels(0, 200)) == set(range(9))
    given = make("given", "--global-seed", "5", "--num-fid-samples", "2", "--class-labels", *map(str, labels(5, 2)))
    assert np.array_equal(given, five)
    other = make("other", "--global-seed", "5", "--num-fid-samples", "2", "--class-labels", str((labels(5, 1)[0] + 1) % 9))
    assert not np.array_equal(other[0], five[0])


def test_pictures_are_written_one_by_one_when_asked_for(tmp_path: Path) -> None:
    sample_ddp_t_stitch.main([*TINY, "--png", "--sample-dir", str(tmp_path)])
    files = sorted((tmp_path / "ratio_0.50").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), images(tmp_path, "ratio_0.50"))


def test_the_record_tells_what_makes_two_files_comparable(whole: Path) -> None:
    record = json.loads((whole / "ratio_0.50.json").read_text())
    assert StitchSchedule.from_json(record["schedule"]) == StitchSchedule.from_ratio(0.5) and record["name"] == "S:50 L:50"
    assert record["settings"]["num_steps"] == 3 and record["settings"]["cfg_scale"] == 2.0
    assert record["weights"].keys() == {"S", "L", "vae"}
    assert (record["num_images"], record["seed"], record["per_proc_batch_size"], record["dtype"]) == (13, 0, 2, "fp32")


def test_all_sixty_six_shares_have_their_own_file() -> None:
    args = sample_ddp_t_stitch.parse_args([*QUICK, "--three_combo"])
    named = generate.file_names(sample_ddp_t_stitch.choose_schedules(args), stitched_files(args, sampling_plan(args, fid=True), three=True))
    assert len(named) == 66 and named["S0.4_B0.2_L0.4"].fractions == (0.4, 0.2, 0.4)


def test_imagenet_defaults_are_the_published_ones_and_a_preset_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(script, *arguments: str) -> tuple:
        seen = []
        monkeypatch.setattr(script, "generate", lambda ranks, args, plan, *rest: seen.append(plan))
        script.main([*arguments, "--device", "cpu"])
        (plan,) = seen
        return (
            plan.solver.num_steps, type(plan.solver).__name__, plan.guidance.scale, plan.guidance.channels, Path(plan.vae).name, plan.max_batch,
            len(plan.labels),
        )  # fmt: skip

    few = ["--num-fid-samples", "2"]
    assert chosen(sample_ddp) == (250, "DDPM", 1.5, 3, "sd-vae-ft-ema", 32, 50_000)
    assert chosen(sample_ddp_t_stitch, "--image-size", "512", *few) == (250, "DDIM", 1.5, 3, "sd-vae-ft-ema", 32, 2)
    assert chosen(sample_ddp_t_stitch, "--preset", "emoji", *few) == (20, "DDIM", 2.0, None, "vae", 32, 2)
    assert chosen(sample_ddp, "--cfg-scale", "4", "--num-sampling-steps", "50", "--vae", "mse", *few) == (50, "DDPM", 4.0, 3, "sd-vae-ft-mse", 32, 2)


BAD_INPUT = {
    "other settings": (["--num-sampling-steps", "2"], "holds another sweep (other settings)"),
    "a longer list": (["--ratios", "0", "0.25", "0.5", "1"], "holds another sweep (other schedules)"),
    "another batch": (["--per-proc-batch-size", "3"], "holds another sweep (other per_proc_batch_size, max_batch)"),
    "ratio": (["--ratios", "0.5", "1.1"], "ratio must lie in [0, 1]"),
    "the same twice": (["--ratios", "0.5", "0.50"], "ratio_0.50 is asked for twice"),
    "label": (["--class-labels", "9"], "choose from 0..8"),
    "weights": (["--sample-dir", "elsewhere", "--s_ckpt", "nowhere.pt"], "nowhere.pt"),
    "a file in the way": (["--sample-dir", "file"], "is a file"),
    "samples of unknown origin": (["--sample-dir", "unknown"], "no config.json"),
    "somebody's own folder work": (["--sample-dir", "mine"], "no config.json"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "ratio_0.50.npz").touch()
    (tmp_path / "mine" / "work").mkdir(parents=True)
    (tmp_path / "mine" / "work" / "thesis.txt").write_text("mine")
    before = contents(tmp_path) | contents(whole)
    arguments, says = BAD_INPUT[case]
    with pytest.raises(SystemExit) as stopped:
        run(lambda: sample_ddp_t_stitch.main([*SWEEP, "--sample-dir", str(whole), *arguments]))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert error.startswith("error: ") and "\n" not in error and says in error
    assert contents(tmp_path) | contents(whole) == before


@pytest.mark.parametrize(
    "arguments",
    [["--num-fid-samples", "0"], ["--per-proc-batch-size", "0"], ["--fractions", "0.5,0.5"], ["--fractions", "a,b,c"], ["--three_combo", "--ratios", "0"]],
    ids=" ".join,
)
def test_values_that_are_none_are_refused_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        sample_ddp_t_stitch.main([*QUICK, *arguments])
    assert stopped.value.code == 2 and "error: argument" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["another sweep", "weights that one rank lacks"])
def test_what_one_rank_refuses_all_ranks_refuse_at_once(whole: Path, tmp_path: Path, case: str) -> None:
    if case == "another sweep":  # which rank 0 alone looks at
        arguments, says = ["--sample-dir", str(whole), "--global-seed", "1"], "holds another sweep (other seed)"
    else:
        arguments, says = ["--sample-dir", str(tmp_path / "new"), "--s_ckpt", "small.safetensors"], "small.safetensors"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        if rank != 1:
            (folder / "small.safetensors").symlink_to(ROOT / "pretrained_models" / "emoji" / "dit-small.safetensors")
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, SCRIPT, *SWEEP, *arguments]
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=120)[1].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], errors
    assert all(error.splitlines()[-1].startswith("error: ") and says in error for error in errors)
    assert not (tmp_path / "new").exists()

"""Checkpoints: what is made again from a file, files that are not whole, and what is never run."""

import copy
import errno
import hashlib
import os
import pickle

import pyro
import pytest
import torch
from shared.parts import build, combinations, draw
from shared.processes import Program, run
from shared.runs import binary, make
from torch import nn

import pyrovae as pv
from pyrovae.objectives import MonteCarloKL
from pyrovae.training import checkpoint_file
from pyrovae.training.checkpoint_file import earlier, locked, read, write
from pyrovae.training.specification import build as build_from

# --- made again from the file alone -----------------------------------------------------------------------------------


def log_joint(model, guide, x):
    """log p(x, z) and log q(z|x) at draws of the guide, from seed 1."""
    pyro.set_rng_seed(1)
    loss = MonteCarloKL()
    with torch.no_grad():
        _, parts = loss.surrogate(model, guide, x)
    return torch.stack([parts.reconstruction, parts.kl])


@pytest.mark.parametrize(("prior", "guide", "likelihood", "decoder", "encoder"), list(combinations()))
def test_every_part_is_made_again(prior, guide, likelihood, decoder, encoder, tmp_path):
    model, guide_module = build(prior, guide, likelihood, decoder, encoder)
    x = draw(likelihood)
    with torch.no_grad():
        for parameter in [*model.parameters(), *guide_module.parameters()]:
            parameter += 0.01 * torch.randn_like(parameter)
    pv.save(tmp_path / "pair.pt", model, guide_module, note="kept")
    if guide == "Refined":  # of a model that is a plain function
        with pytest.raises(ValueError, match=r"is a function\): make them as they were, and give them"):
            pv.load(tmp_path / "pair.pt")
        return
    state = torch.get_rng_state()
    content = pv.load(tmp_path / "pair.pt")
    again, guide_again = content["model"], content["guide"]
    assert content["note"] == "kept"
    assert type(again.prior) is type(model.prior)
    assert torch.equal(log_joint(again, guide_again, x), log_joint(model, guide_module, x))
    if prior == "VampPrior":
        assert again.prior.guide is guide_again, "what was shared is shared again"
    torch.set_rng_state(state)
    pv.save(tmp_path / "pair.pt", again, guide_again)
    assert torch.equal(torch.get_rng_state(), state), "saving takes no random numbers"


def test_dtype_frozen_parameters_and_hierarchies_are_made_again(tmp_path):
    prior = pv.priors.MixtureOfNormals(3, 4)
    model, guide = (
        m.double() for m in pv.two_layer_vae((1, 4, 3), latent_dims=(2, 3), hidden_features=(5, 6), prior=prior)
    )
    model.likelihood.requires_grad_(False)
    pv.save(tmp_path / "a.pt", model, guide)
    again, guide_again = (pv.load(tmp_path / "a.pt")[name] for name in ("model", "guide"))
    z = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(again.decode(z), model.decode(z))
    assert repr(again) == repr(model)
    assert repr(guide_again) == repr(guide)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


class OfMyOwn(pv.priors.Prior):
    def forward(self):
        return torch.distributions.Normal(torch.zeros(2), 1.0)


def changed():
    model, _ = make()
    model.prior = pv.priors.DiagonalNormal(2)
    return model


def likelihood_on(net):
    return pv.GenerativeModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(net, (1, 4, 3)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: pv.GenerativeModel(OfMyOwn(2), make()[0].likelihood),
            r"OfMyOwn in GenerativeModel is no part of pyrovae",
        ),
        (lambda: likelihood_on(nn.Linear(2, 12)), "an argument of Bernoulli in GenerativeModel is a Linear"),
        (lambda: likelihood_on(pv.nets.MLP(2, [4], 12, activation=lambda: nn.ReLU())), "is a function"),
        (changed, "was changed after it was made"),
    ],
)
def test_what_a_file_cannot_make_goes_into_a_given_pair(model, reason, tmp_path):
    model, guide = model(), make()[1]
    pv.save(tmp_path / "a.pt", model, guide)
    with pytest.raises(ValueError, match=reason):
        pv.load(tmp_path / "a.pt")
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert pv.load(tmp_path / "a.pt", model, guide) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parts_still_pickle_and_copy():
    """Also those made with what a file cannot hold: it is the name that a part remembers, not the function."""
    model, _ = make()
    net = pv.nets.MLP(2, [4], 12, activation=lambda: nn.ReLU())
    for part in (model, net):
        for again in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part)):
            assert all(torch.equal(a, b) for a, b in zip(part.parameters(), again.parameters(), strict=True))
            assert repr(again.made_with) == repr(part.made_with)


def test_a_specification_makes_listed_parts_alone():
    with pytest.raises(ValueError, match=r"no part 'os\.system'"):
        build_from(
            {"parts": [{"part": "os.system", "arguments": ["true"], "options": {}}], "roots": [0], "dtype": None}
        )


def test_files_of_the_first_format_go_into_a_given_pair(tmp_path):
    model, guide = make()
    old = {"format": 1, "model": model.state_dict(), "guide": guide.state_dict(), "extra": {"epoch": 3}}
    torch.save(old, tmp_path / "old.pt")
    assert pv.load(tmp_path / "old.pt", *make(seed=1)) == {"epoch": 3}
    with pytest.raises(ValueError, match="it is an older file"):
        pv.load(tmp_path / "old.pt")


def first_format(path):
    """As the first version wrote it: no digest behind the archive."""
    model, guide = make()
    torch.save({"format": 1, "model": model.state_dict(), "guide": guide.state_dict(), "extra": {"epoch": 3}}, path)


def test_the_first_format_says_that_it_has_no_digest(tmp_path, caplog):
    first_format(tmp_path / "old.pt")
    pv.load(tmp_path / "old.pt", *make(seed=1))
    assert "old.pt has format 1, which has no digest" in caplog.text
    assert "pyrovae.save writes it again" in caplog.text
    caplog.clear()
    pv.save(tmp_path / "new.pt", *make())
    pv.load(tmp_path / "new.pt", *make())
    assert not caplog.text


def test_damage_to_the_first_format_changes_no_number(tmp_path, caplog):
    """Any byte flipped: noticed by the checksums in the archive, or without effect."""
    caplog.set_level("ERROR", logger="pyrovae")
    path = tmp_path / "old.pt"
    written = {"format": 1, "model": {"w": torch.arange(5.0)}, "guide": {}, "extra": {}}
    torch.save(written, path)
    data, noticed = path.read_bytes(), 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 + place % 255)]) + data[place + 1 :])
        try:
            found = read(path)
        except ValueError as error:
            assert "old.pt" in str(error)  # noqa: PT017
            noticed += 1
        else:
            assert found.keys() == written.keys()
            assert torch.equal(found["model"]["w"], torch.arange(5.0))
    assert noticed > len(data) / 3


# --- files that are not whole, and what is never run ------------------------------------------------------------------


def small(path):
    write(path, {"model": {"w": torch.arange(5.0)}, "extra": {}, "text": "kept"})
    return path.read_bytes()


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    """Each byte of a small file flipped, each length it can be cut to: an error, never other numbers."""
    path = tmp_path / "a.pt"
    data = small(path)
    torch.load(path, weights_only=True)  # torch's own reader takes it too
    tried = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 + place % 255)]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.pt (is damaged|has format|is no checkpoint)"):
            read(path)
        tried += 1
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.pt is (damaged|no checkpoint)"):
            read(path)
        tried += 1
    assert tried > 1000


def test_a_damaged_run_names_the_file_before(tmp_path):
    path = tmp_path / "run.pt"
    options = {"epochs": 3, "batch_size": 20, "checkpoint": path, "checkpoint_every": 0, "progress": False}
    pv.fit(*make(), binary(), **options)
    data = path.read_bytes()
    for place in range(0, len(data), 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged.*the one before it is .*run\.pt\.previous: move it here"):
            read(path)
    model, guide = make()
    with pytest.raises(ValueError, match="damaged"):
        pv.fit(model, guide, binary(), resume=True, **options)
    assert earlier(path).exists()
    earlier(path).replace(path)
    assert len(pv.fit(model, guide, binary(), resume=True, **options).history) == 3


def test_code_in_a_file_never_runs(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    path = tmp_path / "bomb.pt"
    for content in ({"format": 2, "model": Bomb()}, Bomb(), {"format": Bomb()}):
        for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content)), write_signed):
            save(content, path)
            for load in (
                pv.load,
                lambda path: pv.load(path, *make()),
                lambda path: pv.fit(*make(), binary(), checkpoint=path, resume=True, progress=False),
            ):
                with pytest.raises(ValueError, match="damaged or no checkpoint"):
                    load(path)
                assert not ran.exists()


def write_signed(content, path):
    """With a valid digest: that a file is whole says nothing about what is in it."""
    torch.save(content, path)
    data = path.read_bytes()
    path.write_bytes(data + checkpoint_file._MARK + hashlib.sha256(data).digest())


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "link"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_leaves_the_file_whole(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "a.pt"
    before = small(path)

    def fail(*arguments, **options):
        raise OSError(error, os.strerror(error))

    if failing == "write":
        original = checkpoint_file.Path.open

        def opened(self, *arguments, **options):
            file = original(self, *arguments, **options)
            if self.suffix == ".tmp":
                file.write(b"the first bytes")
                file.close()
                fail()
            return file

        monkeypatch.setattr(checkpoint_file.Path, "open", opened)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif failing == "replace":
        monkeypatch.setattr(checkpoint_file.Path, "replace", fail)
    else:
        monkeypatch.setattr(os, "link", fail)
        monkeypatch.setattr(checkpoint_file.shutil, "copyfile", fail)
    with pytest.raises(OSError, match=r"cannot write .*a\.pt .*the file written before is whole") as caught:
        write(path, {"model": None}, keep=True)
    assert caught.value.errno == error
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert {found.name for found in tmp_path.iterdir()} <= {"a.pt", "a.pt.previous"}


def test_a_file_system_without_links(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    before = small(path)

    def refuse(*arguments):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(path, {"text": "new"}, keep=True)
    assert earlier(path).read_bytes() == before
    assert read(path)["text"] == "new"


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.pt", "/proc/nothing/a.pt"):
        with pytest.raises(OSError, match="folder that can be written to"):
            pv.save(path, *make())
        with pytest.raises(OSError, match="folder that can be written to"):
            pv.fit(*make(), binary(), checkpoint=path, progress=False)
    with pytest.raises(
        ValueError, match="is a folder, expected a checkpoint: name the file checkpoint.pt of a run, or a file"
    ):
        pv.load(tmp_path)
    pv.save(tmp_path / "checkpoint.pt", *make())
    with pytest.raises(ValueError, match=rf"is a folder, expected a checkpoint: name {tmp_path}/checkpoint\.pt$"):
        pv.load(tmp_path)


# --- symbolic links ---------------------------------------------------------------------------------------------------


def link_to(target, link, kind):
    link.parent.mkdir(parents=True, exist_ok=True)
    if kind == "chain":
        (link.parent / "middle").symlink_to(target)
        target = link.parent / "middle"
    link.symlink_to(os.path.relpath(target, link.parent) if kind == "relative" else target)


@pytest.mark.parametrize("kind", ["absolute", "relative", "chain"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(kind, there, tmp_path):
    target, link = tmp_path / "big disk" / "a.pt", tmp_path / "runs" / "link.pt"
    if there:
        pv.save(target, *make())
    link_to(target, link, kind)
    options = {"epochs": 2, "batch_size": 20, "checkpoint_every": 0, "progress": False}
    if there:
        with pytest.raises(ValueError, match=r"link\.pt already exists"):
            pv.fit(*make(), binary(), checkpoint=link, **options)
        target.unlink()
    pv.fit(*make(), binary(), checkpoint=link, **options)
    pv.fit(*make(), binary(), checkpoint=target, resume=True, **options)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert len(read(target)["training"]["state"]["history"]) == 2
    assert earlier(link) == earlier(target) == target.with_name("a.pt.previous")
    assert sorted(path.name for path in target.parent.iterdir()) == ["a.pt", "a.pt.previous"]
    assert {path.name for path in link.parent.iterdir()} <= {"link.pt", "middle"}
    with locked(target), pytest.raises(RuntimeError, match=r"another run is writing to .*link\.pt"), locked(link):
        pass
    data = target.read_bytes()
    target.write_bytes(data[:-1])
    with pytest.raises(
        ValueError, match=r"link\.pt is damaged.*is .*big disk/a\.pt\.previous: move it to .*big disk/a\.pt"
    ):
        pv.load(link)


def test_a_link_to_itself_is_named(tmp_path):
    path = tmp_path / "a.pt"
    path.symlink_to(path)
    with pytest.raises(OSError, match=r"cannot write .*a\.pt"):
        pv.save(path, *make())
    assert path.is_symlink()


# --- locks ------------------------------------------------------------------------------------------------------------


def test_one_lock_at_a_time(tmp_path):
    path = tmp_path / "run.pt"
    with locked(path):
        with pytest.raises(RuntimeError, match=r"another run is writing to .*run\.pt"), locked(path):
            pass
        with pytest.raises(RuntimeError, match="another run is writing"):
            pv.fit(*make(), binary(), checkpoint=path, progress=False)
    assert not list(tmp_path.iterdir())
    with locked(path), locked(tmp_path):  # the folder's lock is another one
        pass


def test_processes_that_race_for_a_lock(tmp_path):
    """Each removes the lock file when it is done: none may then hold the removed one beside one that holds the new."""
    code = """
import os, sys
from pyrovae.training.checkpoint_file import locked
path, done = sys.argv[1], 0
while done < 100:
    try:
        with locked(path):
            os.close(os.open(path + ".held", os.O_CREAT | os.O_EXCL))  # fails if another holds it
            os.unlink(path + ".held")
            done += 1
    except RuntimeError:
        pass
"""
    path = str(tmp_path / "run.pt")
    racing = [Program(code, path) for _ in range(3)]
    assert [(process.communicate(), process.returncode) for process in racing] == [(("", ""), 0)] * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX locks")
def test_a_killed_process_leaves_no_lock(tmp_path):
    code = "import os, sys; from pyrovae.training.checkpoint_file import locked\nwith locked(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert run(code, tmp_path / "a.pt").returncode == -9
    assert (tmp_path / ".a.pt.lock").exists()
    with locked(tmp_path / "a.pt"):
        pass

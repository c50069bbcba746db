# SPDX-License-Identifier: MIT
"""Tests of iris.py, each against something that iris.py did not compute: numbers from the authors' code, a naive loop,
a brute force, the bare emulator, a killed process.

    python -m pytest test_iris.py              some minutes on two cores; needs neither a GPU nor a network
    python test_iris.py --benchmark --compare  speed, and how it compares with the plain data flow
    python test_iris.py --kills 20             a run killed twenty times, against one that was not
    python test_iris.py --baselines Krull      random play and constant actions, fifty games each
"""
import argparse
import base64
import contextlib
import csv
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import zlib
from functools import partial
from pathlib import Path

import ale_py
import cv2
import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ale_py import roms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import iris

# Networks this small gain nothing from threads, and tests that share their machine lose much by them.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Networks that compute in a millisecond. No perceptual loss: no test may wait for half a gigabyte of weights.
TINY = """--preset small --device cpu --no-mixed-precision --perceptual-loss none --layers 1 --width 32 --heads 2
    --dropout 0.1 --tokenizer-channels 32 --tokenizer-blocks 1 --stem-stride 4 --embed-dim 16 --vocab-size 32
    --lstm-size 16 --sequence-length 6 --horizon 5 --burn-in 4""".split()
# Four epochs of real Pong: the world model joins in the second, the policy in the third. The coarsest tokenizer there
# is, since whole games are played with it.
SCHEDULE = TINY + """--stem-stride 16 --tokenizer-blocks 0 --env Pong --epochs 4 --collect-epochs 3 --collect-steps 30
    --starts 1 2 3 --updates 4 3 3 --batches 4 3 3 --revive-codes 3 --eval-every 4 --eval-games 1
    --final-games 1""".split()


def close(actual, expected, rtol=1e-3, atol=2e-6):
    pair = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    torch.testing.assert_close(*pair, rtol=rtol, atol=atol)


def bold_agent(*flags, actions=6):
    """A tiny agent in eval mode whose outputs depend strongly on all its inputs (those of fresh networks hardly do)."""
    torch.manual_seed(0)
    args = iris.parse_args([*TINY, *flags])
    agent = iris.Agent(args, actions).eval()
    with torch.no_grad():
        for p in itertools.chain(agent.world_model.parameters(), agent.actor_critic.parameters()):
            p.add_(0.2 * torch.randn_like(p))
        agent.tokenizer.codebook.weight.normal_()
    return agent, args


# ---- Parity with the authors' implementation -------------------------------------------------------------------------
# Their networks were filled by a rule instead of trained, and their outputs written down. Whoever fills in the same way
# and gets the same numbers computes the same functions.
def fill(name, shape):
    """The rule."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(math.prod(shape)).reshape(shape)
    if len(shape) == 1:
        x = 1 + 0.1 * x if name.endswith(".weight") else 0.1 * x
    elif not (name.endswith(("embedding.weight", "pos_emb.weight")) or "embedding_tables" in name):
        x = (np.abs(x) if "lpips.lin" in name else x) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


def official_shapes(actions=6):
    """Every learnable tensor of an authors' checkpoint for a game with so many actions: name -> shape."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for coder, way, levels, depth, sampled in (("encoder", "down", range(4), 2, "downsample"),
                                               ("decoder", "up", range(1, 5), 3, "upsample")):
        coder = f"tokenizer.{coder}"
        for block in [f"{way}.{i}.block.{j}" for i in range(5) for j in range(depth)] + ["mid.block_1", "mid.block_2"]:
            for i in "12":
                layer(f"{coder}.{block}.norm{i}", 64)
                layer(f"{coder}.{block}.conv{i}", 64, 64, 3, 3)
        for attention in [f"{way}.{i}.attn.{j}" for i in (2, 3) for j in range(depth)] + ["mid.attn_1"]:
            layer(f"{coder}.{attention}.norm", 64)
            for part in ("q", "k", "v", "proj_out"):
                layer(f"{coder}.{attention}.{part}", 64, 64, 1, 1)
        for i in levels:
            layer(f"{coder}.{way}.{i}.{sampled}.conv", 64, 64, 3, 3)
        layer(f"{coder}.norm_out", 64)
    for name, *shape in (("encoder.conv_in", 64, 3, 3, 3), ("encoder.conv_out", 512, 64, 3, 3),
                         ("decoder.conv_in", 64, 512, 3, 3), ("decoder.conv_out", 3, 64, 3, 3),
                         ("pre_quant_conv", 512, 512, 1, 1), ("post_quant_conv", 512, 512, 1, 1)):
        layer(f"tokenizer.{name}", *shape)
    channels = 3
    for i, (width, places) in enumerate(((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)),
                                         (512, (24, 26, 28)))):
        for place in places:
            layer(f"tokenizer.lpips.net.slice{i + 1}.{place}", width, channels, 3, 3)
            channels = width
        shapes[f"tokenizer.lpips.lin{i}.model.1.weight"] = (1, width, 1, 1)
    for name, *shape in [(f"transformer.blocks.{i}.{name}", *shape) for i in range(10) for name, *shape in (
            ("ln1", 256), ("ln2", 256), ("mlp.0", 1024, 256), ("mlp.2", 256, 1024), ("attn.key", 256, 256),
            ("attn.query", 256, 256), ("attn.value", 256, 256), ("attn.proj", 256, 256))] + [("transformer.ln_f", 256)]:
        layer(f"world_model.{name}", *shape)
    for head, outputs in (("observations", 512), ("rewards", 3), ("ends", 2)):
        layer(f"world_model.head_{head}.head_module.0", 256, 256)
        layer(f"world_model.head_{head}.head_module.2", outputs, 256)
    for name, *shape in (("conv1", 32, 3, 3, 3), ("conv2", 32, 32, 3, 3), ("conv3", 64, 32, 3, 3),
                         ("conv4", 64, 64, 3, 3), ("critic_linear", 1, 512), ("actor_linear", actions, 512)):
        layer(f"actor_critic.{name}", *shape)
    return shapes | {
        "tokenizer.embedding.weight": (512, 512), "world_model.pos_emb.weight": (340, 256),
        "world_model.embedder.embedding_tables.0.weight": (actions, 256),
        "world_model.embedder.embedding_tables.1.weight": (512, 256),
        "actor_critic.lstm.weight_ih": (2048, 1024), "actor_critic.lstm.weight_hh": (2048, 512),
        "actor_critic.lstm.bias_ih": (2048,), "actor_critic.lstm.bias_hh": (2048,)}


def unpack(text, bits):
    """Base 85 -> whole numbers of so many bits each."""
    row = np.unpackbits(np.frombuffer(base64.b85decode(text), np.uint8))
    return torch.from_numpy(row[:len(row) // bits * bits].reshape(-1, bits) @ (1 << np.arange(bits)[::-1]))


BLOCKS = unpack(  # two images of 8 x 8 colour blocks
    "d%1ZG32;+m+E9*Cvf7OR`4=7CIgn9C9t0>4gUtSh9<kK}!wIVhZB%)&`*za+#K`sXxi`<Lv6!p@SI%Yasm&t2hoTZs9f=WE+l;qKOr!3&m^~@lDf`"
    "R-OaNnS)vB@7mf2-5n4*v`&s(cen8_kKf9t}vRxuBtrH8HgAbqK|$vd-aCOVqCXb395zYiW3gX#>?*^~-HzLvi7Ea%&c=#sb}aK<eoR19X*d^U;b*"
    "`XwuYSzK^(8C%LTNqN>9cgmbO9PJk&ws_~s}e%2(rqs$<G7S)fYz;6U%;FmIZpyGOEDcxVbL$-LtV{5)&Y~3JJz8P9s)dX3>zeRVG<5&%Uo%TNkQx"
    "0-enTwg?q(MoBFc0YSgSjbupV69I>V5e%(!ZRLEG5am?W;p-xsU@kcjqyeyh?jYN<ssmb^BS|E1T_Y7M2P^<kv$dIS_OgYmTuPO6r7M)mefk!Wl8f"
    "E*p_qRqjhy@%f!K00_(MzPI-85y*", 8).view(2, 3, 8, 8)
TEXTS = unpack(  # two texts of 20 steps: 16 frame tokens and an action each
    "L9FTdg3KXfy4C3NI+J+UKv4p!A`d;j<FX_hS0WbJ8#)?z7JwcwM*YU+WGdWh@h|jOHOs76z$7g~4%$jUz*iVJFdtFyU32e16M{XqtnVx6k0F|h^1h"
    "3?k9mL*vfUFV2@A67V@y@-3KtZ5y=VZ$)TISqu0p-@@r2Boly*%8unSFh8T7ZR-d+Hx6qfP7I}xuK0?QMN%LFZcv)LW~(A{qsOa3MSfsnlx(}c1SP"
    "dOLvox-``s4{_iU04GcVUs-94dtJ{QvDm$(Lglw9fzv8m;=5&#UeOL15nYkfKwo;A*suGp8Q|VDy8ZUdAiil0en@rDS<Y&icif(zTC&rsSZF8<bVp"
    "c%Jg!EGD&KD=lI`hXQ&A=TZWO|V0xe`_2rncj>rGi&IOs<HOAJv;*u2(<{f{gqT@Pv0*-slY!x?XhI+N$)^imWAsFg`OFm(V%=8#*tIQGVdc8?{X<"
    "xvMeGqqz^ddmq)-pw@)ez<G$Y4JG=ekA7=U6cC^?46g((|rnfDjif(wd~ze%6<YRlmH<uFS7+47Opt7uT6HUooLN=T6QDpSt7#RC%C=(WMx7+c%m}"
    "o(Z#Kwh#rWD^0R?2okXO_651I0?HOSG61YsQ5S|vPLo&85fjsGCv^lvfD3v-6)Q}+C8}OmlIRolVVJByd!0|Vk>e@9FQ#&CL^Kff+J7J!mFxIbis="
    "Ki;cME;7Y$*hvv2`L3B+<2u;<w}SZBDjsuc>s&=J#AKtR+fR?EgKLzL!j<}lgh0}WpDrtiFa{(?>>9$Lw|8BFd1pqz@l-_hsogPK_p%AwIaQCk3fh"
    "lI;>Ut0zJ_Hq~YL9W5?On}90&B+wwCdUNWpb`@r%qzDkfScmZLe)-T;F|nM&IJf5v<+)OSCAy5S(Ab{1DeC1LPN}H3S=N1MYrBXSU=O58dmVO>lB9"
    "vKTr$~LY~LruZ2BzF%R2`d)uG6r~s790t=s+{|W6>G-1>ny{Xyc00", 9).view(2, 20, 17)


@pytest.fixture(scope="module")
def official():
    """An authors' checkpoint, with some of the buffers that theirs hold besides and that carry nothing."""
    shapes = official_shapes()
    assert len(shapes) == 609
    buffers = ("world_model.transformer.blocks.0.attn.mask", "world_model.head_rewards.indices",
               "tokenizer.lpips.scaling_layer.shift")
    return {name: fill(name, shape) for name, shape in shapes.items()} | {name: torch.ones(3) for name in buffers}


@pytest.fixture(scope="module")
def paper(official):
    """The paper's agent and LPIPS, loaded from that checkpoint, and the two images as (2, 64, 64, 3) bytes."""
    agent, lpips = iris.Agent(iris.parse_args(["--preset", "paper", "--device", "cpu"]), 6).eval(), iris.LPIPS()
    agent.load_state_dict(iris.rename_official(official, agent.state_dict()))
    lpips.load_state_dict({re.sub(r"net\.slice.\.", "features.", re.sub(r"lin(.)\.model\.1", r"heads.\1", name[16:])): x
                           for name, x in official.items() if re.search(r"\.lpips\.(net|lin)", name)})
    frames = BLOCKS.repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1).to(torch.uint8)
    return agent, lpips, frames


def test_parity_parameter_counts(paper):
    """As many parameters as the paper's networks have."""
    counts = [sum(p.numel() for p in net.parameters()) for net in paper[0].children()]
    assert counts == [4_027_523, 8_448_005, 3_218_983]


@torch.no_grad()
def test_parity_tokenizer(paper):
    """Latents, tokens, reconstructions and all losses, LPIPS among them, are the authors'."""
    agent, lpips, frames = paper
    loss, metrics = agent.tokenizer.loss(iris.to_network(frames), lpips, "l1")
    z = agent.tokenizer.encoder(iris.to_network(frames))
    close([z.mean(), z.std()], [0.004302, 0.527073])
    tokens, _ = agent.tokenizer.look(frames)
    assert tokens.tolist() == [
        [136, 197, 332, 274, 197, 197, 198, 136, 197, 197, 316, 136, 136, 197, 136, 136],
        [136, 197, 197, 136, 136, 11, 197, 136, 136, 136, 197, 197, 136, 197, 197, 197]]
    drawn = (agent.tokenizer.decoder(agent.tokenizer.embed(tokens)) + 1) / 2
    close(drawn[0, 0, 0, :8], [0.448649, 0.559359, 0.493508, 0.536796, 0.549001, 0.470164, 0.58129, 0.539581])
    close([drawn.mean(), drawn.std()], [0.435918, 0.358381])
    close(metrics["codebook_loss"] + metrics["commitment_loss"], 2.057908)
    close([metrics["reconstruction_loss"], metrics["perceptual_loss"]], [0.74846, 0.119931])
    close(loss, 2.057908 + 0.74846 + 0.119931)


@torch.no_grad()
def test_parity_world_model(paper):
    """Logits of tokens, rewards and ends, and the three losses with padding, are the authors'."""
    tokens, actions = TEXTS[..., :16], TEXTS[..., 16]
    token_logits, reward_logits, end_logits = paper[0].world_model.predict(tokens, actions)
    assert token_logits.shape == (2, 320, 512)
    close(token_logits[:, -1, :3], [[-0.791665, 0.007172, 0.396459], [-0.441104, -0.145007, -0.357066]])
    close([token_logits.mean(), token_logits.std()], [0.013447, 0.7346])
    close(reward_logits[0, [0, 9, 19]],
          [[-0.371959, 0.45127, -0.22122], [-0.597207, 0.749426, -1.03149], [-0.621544, 1.792211, -0.85611]])
    close(end_logits[1, [0, 9, 19]], [[0.074451, -0.253749], [0.090679, -0.221607], [0.69562, -0.494648]])
    rewards = torch.tensor([[5., 5, 0, -2, 5, 0, 5, -2, 5, -2, 1, -2, -2, 5, 5, -2, 0, 1, 0, 5],
                            [-2, -2, -2, 0, 1, 0, 1, 5, 5, 5, 5, 1, -2, 1, 1, 1, 1, 0, 1, 1]])
    ends, valid = torch.zeros(2, 20, dtype=torch.long), torch.ones(2, 20, dtype=torch.bool)
    ends[1, 11], valid[1, 12:] = 1, False
    loss, metrics = paper[0].world_model.loss(tokens, actions, rewards, ends, valid)
    close([metrics["token_loss"], metrics["reward_loss"], metrics["end_loss"]], [6.507681, 1.656906, 0.484068])
    close(loss, 6.507681 + 1.656906 + 0.484068)


@torch.no_grad()
def test_parity_actor_critic(paper):
    """Five steps from an empty memory, the images moving by 8 pixels a step: logits and values are the authors'."""
    agent, _, frames = paper
    x, state = iris.to_network(frames), agent.actor_critic.initial_state(2)
    for t, (expected_logits, expected_values) in enumerate((  # logits of image 0, values of both
            ([-0.158743, 0.041964, -0.120678, 0.201389, 0.089643, 0.067635], [-0.154965, -0.139999]),
            ([-0.156531, 0.09235, -0.03043, 0.240176, 0.148975, 0.187253], [-0.183953, -0.134698]),
            ([-0.097373, 0.06937, 0.013791, 0.268911, 0.201343, 0.262421], [-0.189838, -0.091818]),
            ([-0.07215, 0.086502, 0.003101, 0.297289, 0.218158, 0.325546], [-0.192771, -0.135242]),
            ([-0.098016, 0.068875, -0.039255, 0.299391, 0.202879, 0.293898], [-0.186488, -0.155293]))):
        logits, values, state = agent.actor_critic(x.roll(8 * t, dims=-1)[:, None], state)
        close(logits[0, 0], expected_logits)
        close(values[:, 0], expected_values)


def test_parity_lambda_returns():
    """The authors' returns, with an end in the second row."""
    rewards = torch.tensor([[0., 1, -1, 1, 0, 0, 0], [-1, 0, -1, 0, 0, -1, 1]])
    values = torch.tensor([[1.53622, -0.234162, -3.608479, 1.261956, 2.164979, 1.211188, -1.252046, -2.353657],
                           [0.384741, -2.470862, 0.937022, -0.660611, 0.031555, -2.008112, 0.697596, -1.158189]])
    ends = torch.tensor([[0., 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]])
    close(iris.lambda_returns(rewards, values, ends, 0.995, 0.95),
          [[-0.807348, -0.841786, -1.758545, -0.868899, -2.091094, -2.27596, -2.341889],
           [-2.000398, -0.928296, -1.031381, 0.00157, 0.0, -1.109349, -0.152398]])


@pytest.mark.parametrize("name, value", [
    ("world_model.transformer.blocks.3.attn.key.weight", None), ("tokenizer.pre_quant_conv.bias", None),
    ("actor_critic.actor_linear.weight", torch.zeros(9, 512))])
def test_parity_refusals(official, name, value, tmp_path, capfd):
    """A tensor that is missing, or another game's, is refused in one line that names it."""
    changed = {key: x for key, x in (official | {name: value}).items() if x is not None and ".lpips." not in key}
    torch.save(changed, tmp_path / "Pong.pt")
    saying = name if value is None else "[9, 512]"
    refused(capfd, ["--eval", tmp_path / "Pong.pt", "--env", "Pong", "--device", "cpu"], "Pong.pt", saying)
    assert os.listdir(tmp_path) == ["Pong.pt"]


@pytest.mark.parametrize("cached", [True, False])
def test_lpips_weights(cached, tmp_path, monkeypatch, capfd, paper, official):
    """load_lpips puts each tensor of the two files in torch hub's cache where it belongs: the authors' distance comes
    out. A download without the published hash is refused, and nothing of it stays in the cache; auto does without it
    and says so in one line."""
    folder = tmp_path / ("hub/checkpoints" if cached else "server")
    folder.mkdir(parents=True)
    vgg = {f"features.{name.split('.', 4)[4]}": x for name, x in official.items() if ".lpips.net." in name}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2)}, folder / "vgg16-397923af.pth")  # torchvision's has one
    heads = {name[16:]: x for name, x in official.items() if ".lpips.lin" in name}
    torch.save(heads, folder / "lpips_vgg-a78928a0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / ("nowhere" if cached else "server")  # what is in the cache must not be fetched
    monkeypatch.setattr(iris, "VGG_URL", (source / "vgg16-397923af.pth").as_uri())
    monkeypatch.setattr(iris, "HEADS_URL", (source / "lpips_vgg-a78928a0.pth").as_uri())
    if cached:
        tokenizer, frames = paper[0].tokenizer, paper[2]
        with torch.no_grad():
            drawn = tokenizer.decoder(tokenizer.embed(tokenizer.look(frames)[0]))
        lpips, x, step = iris.load_lpips("lpips", "cpu"), iris.to_network(frames), 1e-3 * torch.randn_like(drawn)
        distance = lpips(x, drawn.requires_grad_()).mean()
        close(distance, 0.119931)
        distance.backward()
        with torch.no_grad():  # its gradient against a difference quotient
            close((drawn.grad * step).sum(), (lpips(x, drawn + step) - lpips(x, drawn - step)).mean() / 2, 0.02)
    else:
        with pytest.raises(iris.InputError, match="hash"):
            iris.load_lpips("lpips", "cpu")
        capfd.readouterr()
        assert iris.load_lpips("auto", "cpu") is None
        told = capfd.readouterr().out.splitlines()[-1]  # after torch's "Downloading"
        assert "hash" in told and "no perceptual loss" in told
        assert not any(path.is_file() for path in (tmp_path / "hub").rglob("*"))


# ---- Tokenizer -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_tokenizer_64_tokens():
    """K = 64 (appendix E): an 8 x 8 grid after three halvings, and back to 64 x 64 pixels."""
    tokenizer = iris.Tokenizer(iris.parse_args(["--preset", "paper", "--device", "cpu", "--tokens-per-frame", "64"]))
    frames = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    tokens, _ = tokenizer.look(frames)
    assert tokenizer.encoder(iris.to_network(frames)).shape == (2, 512, 8, 8)
    assert tokens.shape == (2, 64) and tokenizer.draw(tokens).shape == (2, 3, 64, 64)


def test_nearest_code():
    """Tokens are the nearest codes by brute force, row by row; embed() puts a code back in its place."""
    tokenizer = bold_agent()[0].tokenizer
    z, codes = torch.randn(3, 16, 4, 4), tokenizer.codebook.weight.detach()
    tokens = tokenizer.quantize(z)
    for n, row, column in itertools.product(range(3), range(4), range(4)):
        nearest = min(range(32), key=lambda v, here=z[n, :, row, column]: float((here - codes[v]).square().sum()))
        assert tokens[n, 4 * row + column] == nearest
        assert torch.equal(tokenizer.embed(tokens)[n, :, row, column], codes[nearest])


@pytest.mark.parametrize("perceptual", [True, False])
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_tokenizer_loss(kind, perceptual, monkeypatch):
    """The loss against a naive one. Its gradients: the decoder's passes straight through to the latents, commitment
    goes to the latents only, the codebook's to the codes only."""
    tokenizer = bold_agent()[0].tokenizer
    x, z = torch.rand(3, 3, 64, 64) * 2 - 1, torch.randn(3, 16, 4, 4, requires_grad=True)
    monkeypatch.setattr(tokenizer.encoder, "forward", lambda _: z)

    def distance(a, b):  # any will do in the place of LPIPS
        return ((a - b) ** 4).mean((1, 2, 3))

    loss, *_ = tokenizer.loss(x, distance if perceptual else None, kind)
    loss.backward()
    tokens = tokenizer.quantize(z)
    z_q = tokenizer.embed(tokens).detach().requires_grad_()
    naive = 0
    for image, drawn in zip(x, tokenizer.decoder(z_q)):
        d = (image - drawn).flatten()
        naive = naive + (d.abs() if kind == "l1" else d ** 2).mean() + (d ** 4).mean() * perceptual
    naive = naive / 3
    naive.backward()
    gap = (z - z_q).detach()
    close(loss, naive + 2 * gap.square().mean(), rtol=1e-5)
    close(z.grad, z_q.grad + 2 * gap / gap.numel(), rtol=1e-4, atol=1e-7)
    expected = torch.zeros(32, 16)
    for n, place in itertools.product(range(3), range(16)):
        expected[tokens[n, place]] -= 2 * gap.flatten(2)[n, :, place] / gap.numel()
    close(tokenizer.codebook.weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_revive_codes(monkeypatch):
    """Codes that no frame of the batch uses move onto latents of it, by far the most onto one that no code is near;
    those in use stay."""
    agent, _ = bold_agent()
    codes, frames = agent.tokenizer.codebook.weight, torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    before, address = codes.detach().clone(), codes.data_ptr()
    z = before[[3, 7], :, None, None] + 0.01 * torch.randn(2, 16, 4, 4)
    z[1, :, 2, 1] = before[7] * 3
    monkeypatch.setattr(agent.tokenizer.encoder, "forward", lambda _: z)
    used = agent.tokenizer.quantize(z).unique().tolist()
    assert 2 <= len(used) <= 3
    run = types.SimpleNamespace(agent=agent, replay=types.SimpleNamespace(
        frames=frames, sample=lambda batch, steps, align: (torch.tensor([[0], [1]]), None)))
    iris.Training.revive_codes(run)
    assert codes.data_ptr() == address  # recorded CUDA graphs go on reading the codes from there
    latents, far = z.movedim(1, -1).reshape(32, 16), 0
    for code, (old, new) in enumerate(zip(before, agent.tokenizer.codebook.weight)):
        assert torch.equal(old, new) if code in used else (new == latents).all(-1).any()
        far += code not in used and torch.equal(new, z[1, :, 2, 1])
    assert far >= 25


@pytest.mark.parametrize("every, moves", [(0, 0), (2, 3)])
def test_optimize(every, moves, monkeypatch):
    """Updates with and without moved codes: that many moves, each before an update; one step of the optimiser an
    update, of this network only; metrics are means over the updates."""
    agent, args = bold_agent("--revive-codes", str(every), "--updates", "5", "1", "1", "--learning-rates", *["0.1"] * 3)
    events, losses = [], iter(range(5))
    p = agent.tokenizer.codebook.weight
    network = types.SimpleNamespace(
        train=lambda: events.append("train"), eval=lambda: events.append("eval"), parameters=lambda: [p],
        loss=lambda n: (events.append("loss"), (p.sum() * 0 + n, dict(n=p.sum() * 0 + n)))[1])
    run = types.SimpleNamespace(
        args=args, agent=types.SimpleNamespace(tokenizer=network), progress=lambda work, label: work,
        revive_codes=lambda: events.append("move"), batch=lambda part: [(1, (next(losses),))],
        amp=torch.autocast("cpu", enabled=False), optimizers=dict(tokenizer=types.SimpleNamespace(
            zero_grad=lambda: setattr(p, "grad", None), step=lambda: events.append("step"))))
    metrics = iris.Training.optimize(run, "tokenizer")
    assert metrics["n"] == 2 and type(metrics["n"]) is float and metrics["tokenizer_grad_norm"] == 0
    assert events[0] == "train" and events[-1] == "eval" and events.count("move") == moves
    assert [event for event in events if event != "move"][1:-1] == ["loss", "step"] * 5
    assert all(events[i + 1] == "loss" for i, event in enumerate(events) if event == "move")


def test_pieces_of_a_batch():
    """A batch of 150 frames goes through the tokenizer in pieces, whose gradients add up to that of all at once, also
    in the update itself."""
    agent, args = bold_agent("--batches", "150", "1", "1", "--updates", "1", "1", "1", "--revive-codes", "0")
    frames = torch.randint(256, (200, 64, 64, 3), dtype=torch.uint8)
    run = types.SimpleNamespace(args=args, perceptual=None, optimizers=dict(tokenizer=0), replay=types.SimpleNamespace(
        frames=frames, sample=lambda batch, steps, align: (torch.arange(7, 7 + batch)[:, None], None)))
    pieces, gradients = iris.Training.batch(run, "tokenizer"), []
    assert [len(inputs[0]) for _, inputs in pieces] == [64, 64, 22]
    for batch in (pieces, [(1, (iris.to_network(frames[7:157]), None, "l2"))]):
        agent.zero_grad()
        for share, (x, perceptual, _) in batch:
            (share * agent.tokenizer.loss(x, perceptual, "l2")[0]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.tokenizer.parameters()]))
    run.agent, run.amp, run.progress = agent, torch.autocast("cpu", enabled=False), lambda work, label: work
    run.batch, run.optimizers = lambda part: pieces, dict(tokenizer=types.SimpleNamespace(
        zero_grad=agent.zero_grad, step=lambda: gradients.append(
            torch.cat([p.grad.flatten() for p in agent.tokenizer.parameters()]))))
    assert 1e-4 < iris.Training.optimize(run, "tokenizer")["tokenizer_grad_norm"] < 10  # so that nothing was clipped
    for other in (gradients[0], gradients[2]):
        close(other, gradients[1], atol=1e-4 * float(gradients[1].abs().max()))


def test_precision_is_this_machines(tmp_path):
    """A run from another device has the precision that suits this one, unless the command line says otherwise; on its
    own device it keeps what it had."""
    wanted = iris.parse_args(["--device", "cpu"]).mixed_precision
    for device, flags, expected in (("elsewhere", [], wanted), ("cpu", [], not wanted), (
            "elsewhere", ["--mixed-precision"], True), ("elsewhere", ["--no-mixed-precision"], False)):
        torch.save(dict(args=dict(preset="small", device=device, mixed_precision=not wanted)), tmp_path / "run.pt")
        args = iris.parse_args(["--eval", str(tmp_path / "run.pt"), "--device", "cpu", *flags])
        assert args.mixed_precision == expected, (device, flags)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), cv2.error("no window")])
def test_errors_of_libraries(error, tmp_path, capfd, monkeypatch):
    """A GPU that is too small, a display that cannot be opened: one line too."""
    monkeypatch.setattr(iris, "train", lambda *_: (_ for _ in ()).throw(error))
    refused(capfd, ["--run-dir", tmp_path], str(error).splitlines()[0])


# ---- World model -----------------------------------------------------------------------------------------------------
def random_text(args, batch=2, steps=6):
    return torch.randint(args.vocab_size, (batch, steps, args.tokens_per_frame)), torch.randint(6, (batch, steps))


@torch.no_grad()
def test_cached_steps_equal_the_full_pass():
    """Uneven chunks through a key-value cache give the hidden states of one pass over the whole text."""
    agent, args = bold_agent("--layers", "3")
    x = agent.world_model.embed(*random_text(args))  # 6 x 17 positions: all there are
    full, caches, start = agent.world_model(x), torch.full((3, 2, 2, 2, 102, 16), math.nan), 0
    for length in (15, 2, 1, 1, 2, 17, 1, 30, 33):
        close(agent.world_model(x[:, start:start + length], caches, start), full[:, start:start + length], 1e-4, 1e-5)
        start += length
    assert start == x.shape[1]


@torch.no_grad()
def test_causality():
    """A token or an action changes no earlier logit, and does change the next one."""
    agent, args = bold_agent("--layers", "3")
    tokens, actions = random_text(args)
    before = agent.world_model.predict(tokens, actions)
    for t, k in ((0, 0), (2, 7), (3, 15), (4, 16), (5, 15)):  # k = 16: the action of step t
        others, acts = tokens.clone(), actions.clone()
        if k < 16:
            others[:, t, k] = (others[:, t, k] + 1) % args.vocab_size
        else:
            acts[:, t] = (acts[:, t] + 1) % 6
        after = agent.world_model.predict(others, acts)
        # Of a step's 17 positions 16 speak of tokens, 0 .. 14 and 16; rewards and ends are read at the action.
        for old, new, first in zip(before, after, (16 * t + min(k, 15), t, t)):
            close(new[:, :first], old[:, :first], atol=1e-6)
            assert (new[:, first] - old[:, first]).abs().amax() > 1e-3


@pytest.mark.parametrize("reward_loss", ["cross-entropy", "mse"])
def test_padding_reaches_no_loss(reward_loss):
    """Whatever stands in padded steps, loss and gradients stay; they are those of the text without its padding."""
    agent, args = bold_agent("--reward-loss", reward_loss)
    (tokens, actions), rewards, ends = random_text(args), torch.randn(2, 6), torch.randint(2, (2, 6))
    text, valid, results = [tokens, actions, rewards, ends], torch.ones(2, 6, dtype=torch.bool), []
    valid[:, 4:] = False
    others = [torch.where(valid.view(2, 6, *[1] * (x.dim() - 2)), x, y) for x, y in zip(
        text, (*random_text(args), 3 - rewards, 1 - ends))]
    for *inputs, mask in ((*text, valid), (*others, valid), (*(x[:, :4] for x in text), valid[:, :4])):
        agent.zero_grad()
        loss, _ = agent.world_model.loss(*inputs, mask)
        loss.backward()
        results.append(torch.cat([loss[None]] + [p.grad.flatten() for p in agent.world_model.parameters()]))
    close(results[1], results[0], rtol=1e-5, atol=1e-7)
    close(results[2], results[0], rtol=1e-4, atol=1e-6)
    unmasked, _ = agent.world_model.loss(*text, torch.ones_like(valid))
    assert (unmasked - loss).abs() > 1e-3  # so these steps would have counted


def test_sample():
    """Evenly spread numbers hit classes as often as their probabilities say, impossible ones never: not at u = 0, nor
    at the largest u below 1, however the float32 sum of the probabilities is rounded."""
    logits, N = torch.tensor([1.0, -math.inf, 0.3, -2.0, 2.0, -math.inf]), 100_000
    u = (torch.arange(N) + 0.5) / N
    for temperature in (1.0, 0.5):
        p = np.exp(logits.double().numpy() / temperature)
        drawn = iris.sample(logits.expand(N, -1), u, temperature).bincount(minlength=6)
        close(drawn / N, p / p.sum(), rtol=0, atol=1e-4)
        assert drawn[1] == drawn[5] == 0
    torch.manual_seed(0)
    logits = 3 * torch.randn(2000, 50)
    logits[:, :2] = logits[:, -2:] = -math.inf
    for edge in (0.0, 1 - 2 ** -24):
        drawn = iris.sample(logits, torch.full((2000,), edge))
        assert drawn.min() >= 2 and drawn.max() <= 47


# ---- Replay ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("align", ["start", "stop"])
@pytest.mark.parametrize("steps", [1, 6, 21])
def test_replay(align, steps):
    """Segments never leave their episode, and valid marks exactly what lies inside it. Episodes come up equally often
    however long they are, the running one too; so do the steps of an episode, as start (padding on the right) or stop
    (padding on the left)."""
    replay, lengths, N = iris.Replay(300, 16, torch.float32, torch.device("cpu")), (1, 3, 50, 7, 200), 20_000
    for length, t in ((n, t) for n in lengths for t in range(n)):
        replay.add(np.full((64, 64, 3), t, np.uint8), t % 5, float(t), length < 200 and t == length - 1, t == 0)
    begins = np.cumsum((0, *lengths))
    assert (replay.size, replay.episodes) == (261, 5) and replay.ends.nonzero().flatten().tolist() == [0, 3, 53, 60]
    assert replay.frames[61:261, 5, 5, 1].tolist() == replay.rewards[61:261].tolist() == list(range(200))
    torch.manual_seed(0)
    index, valid = (x.numpy() for x in replay.sample(N, steps, align))
    assert index.shape == valid.shape == (N, steps)
    anchors = index[:, 0 if align == "start" else -1]
    wanted = anchors[:, None] + np.arange(steps) - (0 if align == "start" else steps - 1)
    episode = np.searchsorted(begins, anchors, side="right")[:, None] - 1
    assert (valid == ((wanted >= begins[episode]) & (wanted < begins[episode + 1]))).all()
    assert (index >= begins[episode]).all() and (index < begins[episode + 1]).all() and (index == wanted)[valid].all()

    def chi_square(counts):
        return ((counts - counts.mean()) ** 2 / counts.mean()).sum()

    assert chi_square(np.histogram(anchors, begins)[0]) < 25  # 4 degrees of freedom: 1 in 20,000 draws exceeds it
    for begin, length in ((4, 50), (54, 7), (61, 200)):
        counts = np.bincount(anchors, minlength=261)[begin:begin + length]
        assert chi_square(counts) < length + 5 * math.sqrt(2 * length)


# ---- Environment: real games, against the bare emulator --------------------------------------------------------------
class RawGame:
    """A game on the emulator itself, one raw frame after another, after so many no-ops."""
    def __init__(self, name, noops):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(name))
        self.ale.reset_game()
        for _ in range(noops):
            self.ale.act(0)
        self.frame = self.shrink(self.ale.getScreenRGB())

    def shrink(self, screen):
        return cv2.resize(screen, (64, 64), interpolation=cv2.INTER_AREA)

    def step(self, action):
        """Four raw frames -> their reward; self.frame is then the maximum of the last two."""
        action, reward, screens = self.ale.getMinimalActionSet()[action], 0, []
        for _ in range(4):
            reward += self.ale.act(action)
            screens.append(self.ale.getScreenRGB())
        self.frame = self.shrink(np.maximum(*screens[2:]))
        return reward


def noops(game, seed, training=True):
    """How many no-ops a game begins with, as make_env tells."""
    env = iris.make_env(f"ALE/{game}-v5", training=training)
    count = int(env.reset(seed=seed)[1]["episode_frame_number"][0])
    env.close()
    return count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("game, name", [("Pong", "pong"), ("MsPacman", "ms_pacman"), ("Breakout", "breakout")])
def test_env_equals_the_emulator(game, name, training):
    """Frames and rewards of make_env are those of a naive loop: frame skip, maximum, area resize, the minimal actions,
    rewards as they are. A single repeated (sticky) action among 250 random ones would lead elsewhere."""
    env, raw = iris.make_env(f"ALE/{game}-v5", training=training), RawGame(name, noops(game, 5, training))
    frames, _ = env.reset(seed=5)
    assert frames.shape == (1, 1, 64, 64, 3) and frames.dtype == np.uint8 and (frames[0, 0] == raw.frame).all()
    assert env.single_action_space.n == len(raw.ale.getMinimalActionSet())
    for t, action in enumerate(np.random.default_rng(3).integers(env.single_action_space.n, size=250)):
        frames, rewards, *_ = env.step(np.array([action]))
        reward = raw.step(action)
        if raw.ale.game_over():  # in the midst of four frames, so the last picture may differ
            assert t > 50
            break
        assert (frames[0, 0] == raw.frame).all() and rewards[0] == reward


def test_env_starts():
    """In training the seed decides about the number of no-ops, at most 30; in evaluation every game begins alike."""
    counts = {}
    for training in (True, False):
        env = iris.make_env("ALE/Pong-v5", training=training)
        counts[training] = [int(env.reset(seed=s)[1]["episode_frame_number"][0]) for s in (*range(40), 7)]
    assert len(set(counts[True])) > 10 and 20 < max(counts[True]) <= 30 and counts[True][7] == counts[True][-1]
    assert len(set(counts[False])) == 1


@pytest.mark.parametrize("training", [True, False])
def test_env_lost_life(training):
    """A lost life in Breakout ends an episode in training, while the game goes on, and is no end in evaluation."""
    env, rng, losses, lives = iris.make_env("ALE/Breakout-v5", training=training), np.random.default_rng(0), 0, 5
    _, info = env.reset(seed=0)
    while lives > 0:
        clock = info["episode_frame_number"][0]
        _, _, terminated, truncated, info = env.step(rng.integers(4, size=1))
        lost, lives = info["lives"][0] < lives, int(info["lives"][0])
        assert terminated[0] == (lost if training else lives == 0) and not truncated[0]
        assert lives == 0 or info["episode_frame_number"][0] == clock + 4  # the same game, nothing restarted
        losses += lost
    assert losses == 5


def test_time_limit():
    """20,000 raw frames are all that training gives a game: truncated, not terminated; no end for the world model, but
    an episode is over and a new game begins. Evaluation goes on. (Breakout waits for ever for its fire button.)"""
    game, env = iris.Game("ALE/Breakout-v5", 0), iris.make_env("ALE/Breakout-v5", training=False)
    env.reset(seed=0)
    for t in range(1, 5001):
        assert game.number == 0
        result = game.step(0)
        assert result == (0.0, False, None if t < 5000 else 0.0) and game.first == (t == 5000)
        *_, terminated, truncated, _ = env.step(np.array([0]))
        assert not terminated[0] and not truncated[0]
    assert game.number == 1 and len(game.actions) == 0


def test_games_against_the_emulator():
    """Two games of Breakout, life after life: after a lost one the next episode's first frame comes after one no-op,
    the next game has a seed of its own, and a score is the sum over all lives."""
    game, rng, number, score, scores = iris.Game("ALE/Breakout-v5", 40), np.random.default_rng(0), 0, 0, []
    raw, first = RawGame("breakout", noops("Breakout", 40)), True
    while number < 2:
        assert (game.frame == raw.frame).all() and game.first == first and game.number == number
        action, lives = int(rng.integers(4)), raw.ale.lives()
        reward = raw.step(action)
        first, score = raw.ale.lives() < lives, score + reward
        over = raw.ale.game_over()
        if first and not over:
            score += raw.step(0)
        assert game.step(action) == (reward, first, score if over else None)
        if over:
            scores.append(score)
            number, score = number + 1, 0
            raw = RawGame("breakout", noops("Breakout", 40 + number))
    assert max(scores) > 0


def test_game_resumes():
    """In the midst of a second game of Ms. Pac-Man, a life down: number and actions, which a checkpoint holds, bring it
    back, and the rest of it is the same, frame by frame, up to its score. (Breakout would forgive a lost action: its
    ball waits.)"""
    rng, one, other = np.random.default_rng(0), iris.Game("ALE/MsPacman-v5", 7), iris.Game("ALE/MsPacman-v5", 7)
    assert noops("MsPacman", 7) != noops("MsPacman", 8)
    while not (one.step(int(rng.integers(9)))[1] and one.number == 1 and one.actions):
        pass
    for _ in range(20):
        one.step(int(rng.integers(9)))
    other.begin(one.number)
    for action in list(one.actions):
        other.step(action)
    while one.number == 1:
        assert (one.frame == other.frame).all() and one.first == other.first
        action = int(rng.integers(9))
        assert one.step(action) == other.step(action)
    assert other.number == 2 and (one.frame == other.frame).all()


# ---- Actor-critic and dreams -----------------------------------------------------------------------------------------
def test_lambda_returns():
    """By hand; and as the weighted mean of all n-step returns, which is what a lambda-return is."""
    rewards, values, ends = torch.tensor([[1., 2.]]), torch.tensor([[9., 2., 4.]]), torch.zeros(1, 2)
    # G_1 = 2 + 0.5 * 4 = 4 and G_0 = 1 + 0.5 (0.75 * 2 + 0.25 * 4) = 2.25; V_0 = 9 has no part in it
    assert iris.lambda_returns(rewards, values, ends, 0.5, 0.25).tolist() == [[2.25, 4]]
    assert iris.lambda_returns(rewards, values, torch.tensor([[1., 0.]]), 0.5, 0.25).tolist() == [[1, 4]]
    torch.manual_seed(0)
    rewards, values, ends = torch.randn(6, 11), torch.randn(6, 12), (torch.rand(6, 11) < 0.15).float()
    returns = iris.lambda_returns(rewards, values, ends, 0.9, 0.8)

    def n_step(b, t, n):
        total = 0.0
        for k in range(n):
            total += 0.9 ** k * rewards[b, t + k]
            if ends[b, t + k]:
                return total
        return total + 0.9 ** n * values[b, t + n]

    for b, t in itertools.product(range(6), range(11)):
        rest = 11 - t
        close(returns[b, t], sum(0.2 * 0.8 ** (n - 1) * n_step(b, t, n) for n in range(1, rest))
              + 0.8 ** (rest - 1) * n_step(b, t, rest), 1e-4, 1e-5)


@torch.no_grad()
def naive_dream(agent, tokens, past_actions, frame, state, u, actions=None):
    """A dream by the book: for every single token the world model reads the whole text so far."""
    world_model, text, steps = agent.world_model, [], []

    def read(head):
        return head(world_model(torch.stack(text, dim=1))[:, -1])

    def draw(logits, numbers):
        sums = logits.detach().double().softmax(-1).cumsum(-1).numpy()
        return torch.tensor([int(np.searchsorted(row, x, side="right")) for row, x in zip(sums, numbers.numpy())])

    for t in range(tokens.shape[1]):
        text += [world_model.token_embedding(token) for token in tokens[:, t].T]
        text += [world_model.action_embedding(past_actions[:, t])] if t < past_actions.shape[1] else []
    dreamt = dict(frames=[frame], tokens=[tokens[:, -1]], actions=[], rewards=[], ends=[])
    for t in range(u.shape[1]):
        logits, value, state = agent.actor_critic(frame[:, None], state)
        steps.append((logits, value))
        action = draw(logits[:, 0], u[:, t, 0]) if actions is None else actions[:, t]
        text.append(world_model.action_embedding(action))
        dreamt["actions"].append(action)
        reward = read(world_model.head_reward)
        dreamt["rewards"].append(draw(reward, u[:, t, 1]) - 1.0 if reward.shape[-1] == 3 else reward[:, 0])
        dreamt["ends"].append(draw(read(world_model.head_end), u[:, t, 2]).float())
        drawn = []
        for k in range(tokens.shape[2]):
            drawn.append(draw(read(world_model.head_token), u[:, t, 3 + k]))
            text.append(world_model.token_embedding(drawn[-1]))
        dreamt["tokens"].append(torch.stack(drawn, dim=1))
        frame = agent.tokenizer.decoder(agent.tokenizer.embed(dreamt["tokens"][-1])).clamp(-1, 1).detach()
        dreamt["frames"].append(frame)
    return {name: torch.stack(column, dim=1) for name, column in dreamt.items()} | dict(steps=steps, memory=state)


@torch.no_grad()
def dream_inputs(agent, args, context=1, batch=3):
    torch.manual_seed(1)
    tokens, actions = random_text(args, batch, context)
    u = torch.rand(batch, args.horizon - 1, args.tokens_per_frame + 3)
    return tokens, actions[:, :-1], agent.tokenizer.draw(tokens[:, -1]), tuple(torch.randn(2, batch, 16)), u


@pytest.mark.parametrize("context, given, flags", [
    (1, False, ["--horizon", "6", "--layers", "2"]), (3, False, ["--horizon", "4"]),  # both fill the cache to its end
    (2, True, []), (1, False, ["--reward-loss", "mse", "--tokens-per-frame", "64", "--horizon", "3"])])
def test_dream_equals_step_by_step(context, given, flags):
    """With the same random numbers, dream() is the dream by the book: every action, reward, end, token and frame. Given
    actions are obeyed."""
    agent, args = bold_agent(*flags)
    inputs, actions = dream_inputs(agent, args, context), torch.randint(6, (3, args.horizon - 1)) if given else None
    fast, slow = iris.dream(agent, *inputs, actions=actions), naive_dream(agent, *inputs, actions=actions)
    for name in ("tokens", "actions", "ends"):
        assert torch.equal(fast[name].long(), slow[name].long()), name
    for name in ("rewards", "frames"):
        close(fast[name], slow[name], 1e-4, 1e-4)
    assert not given or torch.equal(fast["actions"], actions)
    assert len(slow["tokens"].unique()) > 10 and len(slow["actions"].unique()) > 2  # not always the same thing


def test_one_pass_equals_stepping_with_gradient():
    """The gradient of the policy's loss is that of a policy stepped inside the dream with its gradient."""
    agent, args = bold_agent()
    *start, state, u = dream_inputs(agent, args)
    imagined = iris.dream(agent, *start, state, u)
    policy, gradients = agent.actor_critic, []
    policy.loss(imagined, state, args)[0].backward()
    gradients.append([p.grad.clone() for p in policy.parameters()])
    policy.zero_grad()
    plain = naive_dream.__wrapped__(agent, *start, state, u)
    logits, values = zip(*(step[:2] for step in plain["steps"]))
    logits, values = torch.cat(logits, 1), torch.cat([*values, policy(plain["frames"][:, -1:], plain["memory"])[1]], 1)
    returns = iris.lambda_returns(plain["rewards"], values.detach(), plain["ends"], args.gamma, args.td_lambda)
    now, loss, count = torch.distributions.Categorical(logits=logits), 0.0, 0
    scores, entropies = now.log_prob(plain["actions"]), now.entropy()
    for b, t in itertools.product(range(len(u)), range(args.horizon - 1)):
        if not plain["ends"][b, :t].any():
            advantage = returns[b, t] - values[b, t]
            loss = loss + advantage ** 2 - scores[b, t] * advantage.detach() - args.entropy_coef * entropies[b, t]
            count += 1
    (loss / count).backward()
    assert any(p.grad.abs().max() > 1e-3 for p in policy.parameters())
    for p, gradient in zip(policy.parameters(), gradients[0]):
        close(p.grad, gradient, 1e-3, 1e-5)


@torch.no_grad()
def test_bfloat16(paper):
    """Mixed precision computes nearly the same: of eight images' tokens at least 95 % are equal to float32's, and what
    is drawn, predicted and chosen differs by at most 4 % of its standard deviation, root mean square. Values and memory
    are computed in float32."""
    agent, _, frames = paper
    blocks = torch.randint(256, (6, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames, outputs = torch.cat([frames, blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)]), []
    tokens = agent.tokenizer.look(frames)[0]
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            x, policy = iris.to_network(frames), agent.actor_critic
            logits, values, state = policy(x[None], policy.initial_state(1))
            assert policy.cnn(x).dtype == (torch.bfloat16 if mixed else torch.float32)
            assert {x.dtype for x in (logits, values, *state)} == {torch.float32}
            assert (agent.tokenizer.look(frames)[0] == tokens).float().mean() >= 0.95
            outputs.append([agent.tokenizer.draw(tokens), *agent.world_model.predict(TEXTS[..., :16], TEXTS[..., 16]),
                            logits, values])
    for exact, mixed in zip(*outputs):
        assert 0 < (exact - mixed.float()).square().mean().sqrt() < 0.04 * exact.std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph wants a GPU")
def test_cuda_graph():
    """On a GPU, dreams through the CUDA graph are those without it, also for other inputs than those that it was
    recorded with, and after an update of the weights."""
    agent, args = bold_agent()
    agent.cuda()
    args.device = "cuda"
    for mixed in (False, True):
        args.mixed_precision = mixed
        graph = iris.fast(lambda *inputs: iris.dream(agent, *inputs[:3], inputs[3:5], inputs[5]), args)
        for seed in range(3):
            torch.manual_seed(seed)
            inputs = [torch.randint(32, (3, 1, 16)), torch.zeros(3, 0, dtype=torch.long), torch.rand(3, 3, 64, 64),
                      *torch.randn(2, 3, 16), torch.rand(3, args.horizon - 1, 19)]
            inputs = [x.cuda() for x in inputs]
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
                eager = iris.dream(agent, *inputs[:3], inputs[3:5], inputs[5])
            replayed = graph(*inputs)
            for name in ("tokens", "actions", "rewards", "ends", "frames"):
                assert torch.equal(replayed[name], eager[name]), (mixed, seed, name)
            for p in agent.parameters():
                p.data.mul_(1.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_cuda_compile():
    """On a GPU, compiled losses are the eager ones, and so are their gradients."""
    agent, args = bold_agent("--dropout", "0")
    inputs = dream_inputs(agent, args)
    frames, tail = iris.dream(agent, *inputs), (torch.ones(2, 6), torch.zeros(2, 6).long(), torch.ones(2, 6).bool())
    for network, batch in ((agent.tokenizer, (torch.rand(3, 3, 64, 64), None, "l2")),
                           (agent.world_model, (*random_text(args), *tail)),
                           (agent.actor_critic, (frames, inputs[3], args))):
        network.cuda()
        batch, results = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), batch), []
        for loss in (network.loss, torch.compile(network.loss, dynamic=False)):
            network.zero_grad()
            value, _ = loss(*batch)
            value.backward()
            results.append(torch.cat([value.detach()[None]] + [p.grad.flatten() for p in network.parameters()]).cpu())
        close(results[1], results[0], 1e-2, 1e-3 * float(results[0].abs().max()))


@pytest.mark.parametrize("reward_loss", ["cross-entropy", "mse"])
@pytest.mark.parametrize("part", ["tokenizer", "world_model", "actor_critic"])
def test_no_synchronisation(part, reward_loss, monkeypatch):
    """On torch's meta device nothing has a value: what would wait for one, or mix devices, raises. Three updates of
    each network go through, dreams included; only then are the metrics read. So on a GPU no update waits for it."""
    agent, args = bold_agent("--updates", *"333", "--batches", "70", "3", "3", "--revive-codes", "0",
                             "--reward-loss", reward_loss)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    replay, steps = iris.Replay(200, 16, torch.float32, "meta"), []
    replay.size, replay.episodes = 200, 3
    for wrong in (lambda: float(replay.rewards.sum()), lambda: replay.frames[replay.rewards > 0],
                  lambda: replay.rewards + torch.ones(200)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wrong()
    run = types.SimpleNamespace(args=args, agent=agent.to("meta"), replay=replay, device="meta", amp=torch.autocast(),
                                perceptual=iris.LPIPS().to("meta"), progress=lambda work, label: work)
    run.batch, run.imagine = partial(iris.Training.batch, run), partial(iris.Training.imagine, run)
    run.optimizers = {name: types.SimpleNamespace(zero_grad=network.zero_grad, step=lambda: steps.append(part))
                      for name, network in agent.named_children()}
    with pytest.raises(RuntimeError, match="meta tensors"):
        iris.Training.optimize(run, part)
    assert len(steps) == 3


@pytest.mark.parametrize("size, parts", [(5, [5]), (256, [256]), (600, [256] * 3)])
def test_tokenize_replay(size, parts, monkeypatch):
    """Every frame's tokens and reconstruction are its own, whatever else is looked at beside it; what is not yet played
    is left alone; and the tokenizer looks at 256 at a time, as soon as there are so many."""
    agent, looked = bold_agent("--stem-stride", "16")[0], []
    replay = iris.Replay(700, 16, torch.float32, "cpu")
    replay.frames[:], replay.size, look = torch.randint(256, (700, 64, 64, 3)), size, agent.tokenizer.look
    monkeypatch.setattr(agent.tokenizer, "look", lambda frames: (looked.append(len(frames)), look(frames))[1])
    run = types.SimpleNamespace(agent=agent, replay=replay, amp=contextlib.nullcontext(), progress=lambda work, _: work)
    metrics = iris.Training.tokenize_replay(run)
    assert looked == parts
    with torch.no_grad():
        singly = [look(frame[None]) for frame in replay.frames[:size]]
    tokens, drawn = (torch.cat(column) for column in zip(*singly))
    assert torch.equal(replay.tokens[:size], tokens) and metrics == dict(codes_in_use=len(tokens.unique()))
    close(replay.reconstructions[:size], drawn, 1e-4, 1e-5)
    assert not replay.tokens[size:].any() and not replay.reconstructions[size:].any()


def test_compile(tmp_path, monkeypatch):
    """--compile computes the same metrics in all phases of an epoch. The graphs are those that a GPU would compile;
    they are run without generating code, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows, counters = [], torch._dynamo.utils.counters
    for flags in ([], ["--compile"]):
        counters.clear()
        run = iris.Training(iris.parse_args([*SCHEDULE, "--dropout", "0", *flags]), tmp_path)
        for phase in (run.collect, partial(run.optimize, "tokenizer"), run.tokenize_replay,
                      partial(run.optimize, "world_model"), partial(run.optimize, "actor_critic")):
            torch.manual_seed(0)
            rows.append(phase())
        assert (counters["stats"]["unique_graphs"] >= 3) == bool(flags) and not counters["graph_break"]
    for plain, compiled in zip(rows[:5], rows[5:]):
        assert plain.keys() == compiled.keys()
        close(list(compiled.values()), list(plain.values()), 1e-3, 1e-5)


@torch.no_grad()
def test_memory():
    """Many frames at once give what single calls give; with padding, what the valid frames alone give."""
    policy = bold_agent()[0].actor_critic
    frames, valid = torch.rand(4, 6, 3, 64, 64) * 2 - 1, torch.arange(6) >= torch.tensor([0, 2, 5, 6])[:, None]
    start = tuple(torch.randn(2, 4, 16))
    logits, values, _ = policy(frames, start)
    *_, padded = policy(frames, policy.initial_state(4), valid)
    for b in range(4):
        state, burnt = tuple(part[b:b + 1] for part in start), policy.initial_state(1)
        for t in range(6):
            one_logits, one_values, state = policy(frames[b:b + 1, t:t + 1], state)
            close([*logits[b, t], values[b, t]], [*one_logits[0, 0], one_values[0, 0]], 1e-4, 1e-4)
            burnt = policy(frames[b:b + 1, t:t + 1], burnt)[2] if valid[b, t] else burnt
        for one, other in zip(padded, burnt):
            close(one[b], other[0], 1e-4, 1e-4)


def test_actor_critic_loss():
    """REINFORCE, value and entropy terms against a loop over dreams and steps up to the first end; what is dreamt after
    one changes nothing. The gradient reaches every weight of the actor-critic and nothing else."""
    agent, args = bold_agent()
    inputs = dream_inputs(agent, args, batch=4)
    imagined = iris.dream(agent, *inputs)
    imagined["ends"] = torch.tensor([[0., 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    imagined["rewards"] = torch.randn(4, 4)
    loss, metrics = agent.actor_critic.loss(imagined, inputs[3], args)
    loss.backward()
    for name, p in agent.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == name.startswith("actor_critic."), name
    logits, values, _ = agent.actor_critic(imagined["frames"], inputs[3])
    returns = iris.lambda_returns(imagined["rewards"], values.detach(), imagined["ends"], args.gamma, args.td_lambda)
    policy, value, entropy, steps = 0.0, 0.0, 0.0, 0
    for b, t in itertools.product(range(4), range(4)):
        if not imagined["ends"][b, :t].any():
            log_p, gain = logits[b, t].log_softmax(-1), returns[b, t] - values[b, t]
            policy = policy - log_p[imagined["actions"][b, t]] * gain.item()  # this term does not teach the value
            value, entropy, steps = value + gain ** 2, entropy - (log_p.exp() * log_p).sum(), steps + 1
    assert steps == 4 + 2 + 1 + 4
    terms = [metrics[name] for name in ("policy_loss", "value_loss", "entropy")]
    close([term.item() for term in terms], [term.item() / steps for term in (policy, value, entropy)], 1e-4)
    expected = (policy + value - args.entropy_coef * entropy) / steps
    close(loss, expected, 1e-4)
    expected.backward()  # onto the gradients that are there, which doubles them
    first = {name: p.grad / 2 for name, p in agent.actor_critic.named_parameters()}
    agent.zero_grad()
    imagined["rewards"][1, 2:], imagined["rewards"][2, 1:] = 100.0, -100.0
    imagined["actions"][2, 1:], imagined["frames"][2, 2:] = 5 - imagined["actions"][2, 1:], torch.randn(3, 3, 64, 64)
    agent.actor_critic.loss(imagined, inputs[3], args)[0].backward()
    for name, p in agent.actor_critic.named_parameters():
        close(p.grad, first[name], 1e-3, 1e-5)


# ---- Evaluation ------------------------------------------------------------------------------------------------------
class Reflex:
    """A policy that costs nothing: the action depends on this frame, on every frame since memory began, and on luck."""
    actor_critic = types.SimpleNamespace(initial_state=lambda n: (torch.zeros(n, 1, dtype=torch.long),) * 2)

    def __init__(self, luck):
        self.luck = luck

    def act(self, frames, u, h, c, temperature):
        h = (31 * h + c + frames.long().sum((1, 2, 3))[:, None]) % 1009
        return (self.luck * 9 * u + h[:, 0]).long() % 9, (h, c + 1)


def test_evaluation_counts_every_game():
    """Games of Ms. Pac-Man have the same returns alone, three and five side by side. Without luck they are what a loop
    on the bare emulator gets, which begins every game with an empty memory; and so is all that is recorded."""
    args, returns, recordings = iris.parse_args([*TINY, "--env", "MsPacman"]), {}, {}
    for luck, games in itertools.product((0, 1), (1, 3, 5)):
        returns[luck, games], recordings[luck, games] = iris.evaluate(Reflex(luck), args, games)
    for luck, games in itertools.product((0, 1), (1, 3)):
        assert returns[luck, games].tolist() == returns[luck, 5][:games].tolist()
        assert all(torch.equal(*pair) for pair in zip(recordings[luck, games], recordings[luck, 5]))
    assert len(set(returns[1, 5])) > 2
    raw, state, score, recorded = RawGame("ms_pacman", 0), Reflex.actor_critic.initial_state(1), 0, []
    while not raw.ale.game_over():
        frame, lives = raw.frame, raw.ale.lives()
        action, state = Reflex(0).act(torch.from_numpy(frame)[None], torch.zeros(1), *state, 0.5)
        reward = raw.step(int(action))
        recorded.append((frame, int(action), reward, raw.ale.lives() < lives))
        score += reward
    assert returns[0, 5].tolist() == [score] * 5 and 3 <= sum(row[-1] for row in recorded) and score > 0
    for column, expected in zip(recordings[0, 5], zip(*recorded)):
        assert torch.equal(column, torch.from_numpy(np.stack(expected)[:1000]).to(column.dtype))
    few = iris.evaluate(Reflex(0), args, 2, enough=50)[1]
    assert all(torch.equal(*pair) for pair in zip(few, [column[:50] for column in recordings[0, 5]]))


def test_large_seeds():
    """A date is a fine seed, though the emulator's are smaller than what is made of it."""
    agent, args = bold_agent("--seed", "20261122")
    assert iris.Game("ALE/Pong-v5", args.seed * 100_000).frame.any()
    assert len(iris.evaluate(agent, args, 2, enough=3)[1][0]) == 3


@torch.no_grad()
@pytest.mark.parametrize("reward_loss", ["cross-entropy", "mse"])
def test_held_out_metrics(reward_loss):
    """Forecasts of tokens, and copies of the frame before; rewards and ends that were foreseen; how much of what moves
    is drawn: all against loops over tokens, steps and pixels."""
    agent, args = bold_agent("--reward-loss", reward_loss)
    frames, actions = torch.randint(256, (25, 64, 64, 3), dtype=torch.uint8), torch.randint(6, (25,))
    frames[:, 32:] = frames[0, 32:]  # the lower half never moves
    frames[1::3] = frames[:24:3]  # every third frame is the one before once more
    rewards, ends = torch.tensor([0, 0, 1, 5, -2])[torch.randint(5, (25,))].float(), torch.randint(2, (25,))
    tokens, entropy, right, copied, n = agent.tokenizer.look(frames)[0], 0.0, 0, 0, 0
    for head, name in ((1, "head_reward"), (2, "head_end")):  # now one is foreseen, now another
        layer = getattr(agent.world_model, name)[2]
        layer.weight *= 4
        layer.bias -= agent.world_model.predict(tokens[None, :6], actions[None, :6])[head].mean((0, 1))
    metrics = iris.held_out_metrics(agent, [frames, actions, rewards, ends], args.sequence_length)
    counts = dict.fromkeys(itertools.product(("reward", "end"), ("real", "told", "hit")), 0)
    for begin in (0, 6, 12, 18):  # whole segments only, so the 25th frame is left over
        logits, reward_logits, end_logits = (x[0] for x in agent.world_model.predict(
            tokens[None, begin:begin + 6], actions[None, begin:begin + 6]))
        for t, k in itertools.product(range(1, 6), range(16)):
            p, target = logits[16 * t + k - 1].double().softmax(-1), int(tokens[begin + t, k])
            entropy, right, n = entropy - math.log(p[target]), right + (int(p.argmax()) == target), n + 1
            copied += target == int(tokens[begin + t - 1, k])
        for t in range(6):
            sign = np.sign(float(rewards[begin + t]))
            told = (np.sign(round(float(reward_logits[t]))) if reward_loss == "mse" else
                    {0: -1, 1: 0, 2: 1}[int(reward_logits[t].argmax())])
            for name, real, said in (("reward", sign, told), ("end", ends[begin + t], int(end_logits[t].argmax()))):
                for event, is_so in (("real", real != 0), ("told", said != 0), ("hit", real == said != 0)):
                    counts[name, event] += bool(is_so)
    c = min(copied / n, 0.999)
    close([metrics[name] for name in ("token_cross_entropy", "token_accuracy", "copy_accuracy", "copy_cross_entropy")],
          [entropy / n, right / n, c, -c * math.log(c) - (1 - c) * math.log((1 - c) / 31)])
    for name in ("reward", "end"):
        real, told, hit = (counts[name, event] for event in ("real", "told", "hit"))
        assert real > hit > 0 and told > hit  # or it would prove little
        close([metrics[f"{name}_{x}"] for x in ("count", "recall", "precision")], [real, hit / real, hit / told])
    drawn = (agent.tokenizer.draw(tokens[:24]) + 1) * 127.5
    error = (frames[:24].movedim(-1, 1) - drawn) / 255  # on images in [0, 1]
    close(metrics["heldout_psnr"], -10 * error.square().mean().log10())
    lost, moved = 0.0, 0.0
    for place in range(3 * 64 * 64):
        real, shown = frames[:24].movedim(-1, 1).flatten(1)[:, place].tolist(), drawn.flatten(1)[:, place].tolist()
        background = sorted(real)[11]  # of 24: the lower median
        for x, y in zip(real, shown):
            if abs(x - background) > 25.5:
                lost, moved = lost + abs(x - y), moved + abs(x - background)
    close(metrics["moving_kept"], 1 - lost / moved)


def test_held_out_metrics_of_a_standstill():
    """A game in which nothing moves, scores or ends (Breakout's, until someone presses fire) has finite metrics too:
    anything else would stop the run."""
    agent, args = bold_agent()
    still = [torch.full((12, 64, 64, 3), 90, dtype=torch.uint8), torch.zeros(12, dtype=torch.long),
             torch.zeros(12), torch.zeros(12, dtype=torch.long)]
    metrics = iris.held_out_metrics(agent, still, args.sequence_length)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["reward_count"] == metrics["reward_recall"] == metrics["end_count"] == metrics["end_recall"] == 0


def test_evaluation_of_a_short_game(tmp_path, monkeypatch):
    """A game over before a whole segment or horizon of steps has metrics and pictures too."""
    agent, args = bold_agent()
    short = [torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8), torch.tensor([1, 0, 2]),
             torch.tensor([0.0, 0, 1]), torch.tensor([0, 0, 1])]
    assert len(short[0]) < args.horizon <= args.sequence_length
    monkeypatch.setattr(iris, "evaluate", lambda *_: (np.ones(1), short))
    metrics = iris.evaluation(agent, args, 1, tmp_path, "final")
    assert all(map(math.isfinite, metrics.values())) and metrics["reward_count"] == metrics["end_count"] == 1
    assert {path.name for path in (tmp_path / "media" / "final").iterdir()} == PICTURES


# ---- The command line, on real Pong ----------------------------------------------------------------------------------
def command(*flags):
    return [sys.executable, iris.__file__, *map(str, flags)]


def finish(*flags, **options):
    return subprocess.run(command(*flags), capture_output=True, text=True, **options)


def start_and_stop(run_dir, epoch, how, delay):
    """Starts a training, waits for the end of an epoch and a little longer, and sends a signal."""
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    with subprocess.Popen(command(*SCHEDULE, "--run-dir", run_dir), stderr=subprocess.PIPE, text=True,
                          preexec_fn=listen) as process:
        while not [path for path in run_dir.glob("*/checkpoint.pt") if iris.read_checkpoint(path)["epoch"] >= epoch]:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        time.sleep(delay)
        process.send_signal(how)
        errors = process.stderr.read()
    return next(run_dir.iterdir()), process.returncode, errors


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = finish(*SCHEDULE, "--run-dir", run_dir)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return next(run_dir.iterdir())


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory):
    """The folder of a run that was killed at a random moment after its second epoch."""
    folder, code, _ = start_and_stop(tmp_path_factory.mktemp("killed"), 2, signal.SIGKILL, random.uniform(0, 0.3))
    assert code == -signal.SIGKILL and not (folder / "eval.json").exists()
    return folder


def read_run(folder):
    """All that a run left behind and that must repeat to the last bit: not its name, nor what a clock said."""
    def essence(x):
        if isinstance(x, dict):
            kept = (name for name in x if not str(name).startswith(("seconds", "steps_a_second", "args")))
            return {name: essence(x[name]) for name in kept}
        if isinstance(x, (list, tuple)):
            return [essence(y) for y in x]
        return (str(x.dtype), x.tolist()) if isinstance(x, torch.Tensor) else x

    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    checkpoint, result = torch.load(folder / "checkpoint.pt", weights_only=True), (folder / "eval.json").read_text()
    return essence(dict(rows=rows, checkpoint=checkpoint, result=json.loads(result),
                        frames=b"".join(path.read_bytes() for path in sorted(folder.glob("frames/*.bin")))))


def test_whole_training(whole_run):
    """A run collects real Pong, trains all three networks, evaluates, and leaves behind what makes up a run."""
    run = read_run(whole_run)
    config, rows, state = json.loads((whole_run / "config.json").read_text()), run["rows"], run["checkpoint"]
    assert (config["env"], config["layers"], config["perceptual_loss"]) == ("ALE/Pong-v5", 1, "none")
    assert [row["real_steps"] for row in rows] == ["30", "60", "90", "90"]
    for name, first in (("tokenizer_loss", 1), ("token_loss", 2), ("policy_loss", 3), ("eval_return", 4)):
        assert [row[name] != "" for row in rows] == [epoch >= first for epoch in (1, 2, 3, 4)], name
    raw = RawGame("pong", noops("Pong", 100_000 * config["seed"]))  # the recorded actions lead to the recorded frames
    frames = np.frombuffer(run["frames"], np.uint8).reshape(90, 64, 64, 3)
    for frame, action, reward in zip(frames, state["replay"]["actions"][1], state["replay"]["rewards"][1]):
        assert (raw.frame == frame).all() and raw.step(action) == reward
    torch.manual_seed(config["seed"])
    for name, weight in iris.Agent(types.SimpleNamespace(**config), 6).named_parameters():
        assert weight.tolist() != state["agent"][name][1], f"{name} was not trained"
    assert run["result"]["returns"] == [run["result"]["eval_return"]] and -21 <= run["result"]["eval_return"] <= 21
    for name, kind in itertools.product(("reconstructions", "dream", "futures", "rewards"), ("epoch_004", "final")):
        picture = cv2.imread(str(whole_run / "media" / kind / f"{name}.png"))
        assert min(picture.shape[:2]) > 300 and picture.std() > 5


def test_killed_and_resumed(whole_run, killed_run, tmp_path):
    """kill -9 costs the running epoch and nothing else: resumed, the run ends as the undisturbed one did, to the last
    bit of weights, optimisers, replay and metrics."""
    folder = shutil.copytree(killed_run, tmp_path / "run")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["epoch"] in (2, 3)
    # What a kill leaves that falls between the writing of the two files.
    (folder / "frames" / f"{state['replay']['size']:07d}.bin").write_bytes(bytes(5 * 64 * 64 * 3))
    assert finish("--resume", folder).returncode == 0
    assert read_run(folder) == read_run(whole_run)


def test_stopped_and_resumed(whole_run, tmp_path):
    """Ctrl-C: code 130 and one line that tells how to go on, which works."""
    folder, code, errors = start_and_stop(tmp_path, 1, signal.SIGINT, 0.05)
    assert code == 130 and errors.count("\n") == 1 and f"--resume {folder}" in errors
    assert finish("--resume", folder).returncode == 0
    assert read_run(folder) == read_run(whole_run)


def test_final_evaluation_repeats(whole_run, tmp_path):
    """A run that was stopped in its final evaluation does it again, with the same result: no dropout, no chance. It
    needs no config.json, which is for people."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    (folder / "eval.json").unlink()
    (folder / "config.json").unlink()
    assert iris.main(["--resume", str(folder)]) == 0
    assert read_run(folder) == read_run(whole_run)


@pytest.mark.parametrize("full_for", ["frames", "checkpoint.pt"])
def test_full_disk(killed_run, tmp_path, full_for):
    """No room for more frames, or for a checkpoint: one line, code 2, and the last checkpoint is as it was."""
    folder = shutil.copytree(killed_run, tmp_path / "run")
    before, state = (folder / "checkpoint.pt").read_bytes(), iris.read_checkpoint(folder)
    frames = 30 * 64 * 64 * 3  # bytes of an epoch's
    room = frames - 1 if full_for == "frames" else len(before) // 2
    assert room < frames if full_for == "frames" else room > frames

    def limit():  # a write beyond it fails as on a full disk, because Python ignores SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = finish("--resume", folder, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too large" in done.stderr, done.stderr
    if state["epoch"] == 2:  # the fourth epoch adds no frames
        assert [path.stem for path in folder.rglob("*.tmp")] == ["0000060.bin" if full_for == "frames" else full_for]
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_loss_that_is_not_finite(tmp_path, capfd):
    """A learning rate beyond reason: the run stops with code 1 and one line, and the last good checkpoint stays."""
    flags = ("--run-dir", str(tmp_path), "--starts", "2", "2", "3", "--learning-rates", *["1e30"] * 3)
    assert iris.main([*SCHEDULE, *flags]) == 1
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "not finite" in errors
    state = torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)
    assert state["epoch"] == 1 and all(bool(x.isfinite().all()) for x in state["agent"].values())


def test_flags(whole_run, monkeypatch):
    """A run may be named by its folder or its checkpoint, from anywhere. Freeway collects nearly greedily, unless told
    otherwise. How to compute may change on --resume."""
    for path in (whole_run, whole_run / "checkpoint.pt"):
        args = iris.parse_args(["--resume", str(path), "--compile", "--mixed-precision"])
        assert Path(args.run) == whole_run and args.compile and args.mixed_precision and args.layers == 1
    monkeypatch.chdir(whole_run)
    assert Path(iris.parse_args(["--eval", "checkpoint.pt"]).run).resolve() == whole_run.resolve()
    for flags, expected in (("--env Freeway", 0.01), ("--env ALE/Freeway-v5", 0.01), ("--env Pong", 1.0),
                            ("--env Freeway --temperature 0.5", 0.5), ("--env Freeway --preset small", 0.01)):
        assert iris.parse_args(flags.split()).temperature == expected, flags


def refused(capfd, flags, *saying):
    """Runs a command line that cannot work: code 2 and one line on stderr, which says what is wrong."""
    capfd.readouterr()
    try:
        code = iris.main([str(flag) for flag in flags])
    except SystemExit as stop:  # argparse leaves in this way
        code = stop.code
    errors = capfd.readouterr().err
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("iris.py: "), errors
    for part in saying:
        assert str(part) in errors


ABSENT = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both


@pytest.mark.parametrize("flags, saying", [
    ("--env Brekout", ["Brekout", "Breakout"]), ("--env phys2d/CartPole-v1", ["--env", "phys2d"]),
    ("--resume=", ["checkpoint.pt"]), ("--collect-steps -5", ["--collect-steps", "-5"]),
    ("--epochs many", ["--epochs", "many"]), ("--gamma nan", ["--gamma", "nan"]), ("--updates 1 0 1", ["--updates"]),
    ("--epsilon 1.5", ["--epsilon", "1.5"]), (f"--device {ABSENT}", ["--device", ABSENT]),
    ("--horizon 7", ["--horizon", "--sequence-length"]),
    ("--tokens-per-frame 64 --stem-stride 16", ["--tokens-per-frame", "--stem-stride"]),
    ("--width 33", ["--width", "--heads"]),
    ("--tokenizer-channels 40", ["--tokenizer-channels", "32"]), ("--starts 3 2 4", ["--starts"]),
    ("--no-such-flag", ["--no-such-flag"]),
    ("--perceptual-loss lpips", ["LPIPS", "vgg16-397923af.pth"])])
def test_flags_refused(flags, saying, tmp_path, capfd, monkeypatch):
    """Flags that cannot work are refused by name before anything is written. LPIPS: with neither weights nor network,
    while auto does without, says so in a line, and leaves on record which loss the run has."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(iris, "VGG_URL", "http://127.0.0.1:9/vgg16-397923af.pth")  # nobody listens there
    refused(capfd, [*SCHEDULE, "--run-dir", tmp_path / "runs", *flags.split()], *saying)
    assert not (tmp_path / "runs").exists()
    if "lpips" in flags:
        args = iris.parse_args([*SCHEDULE, "--perceptual-loss", "auto", "--run-dir", str(tmp_path / "runs")])
        args.epochs = 0  # nothing but its beginning
        monkeypatch.setattr(iris, "evaluation", lambda *_: None)
        iris.train(args, tmp_path / "runs" / "run")
        assert "no perceptual loss" in capfd.readouterr().out
        config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
        assert (config["perceptual_loss"], config["reconstruction_loss"]) == ("none", "l2")
        config = iris.read_checkpoint(tmp_path / "runs" / "run")["args"]
        assert (config["perceptual_loss"], config["reconstruction_loss"]) == ("none", "l2")


def test_refused_in_a_shell(tmp_path):
    """As a process of its own, libraries and all, it is one line too. A run folder below a regular file cannot be made,
    not even by root."""
    (tmp_path / "file").write_text("")
    done = finish(*SCHEDULE, "--run-dir", tmp_path / "file" / "runs")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert str(tmp_path / "file") in done.stderr


def edit(path, change):
    """Replaces a file by change(its bytes, half their number)."""
    data = path.read_bytes()
    path.write_bytes(change(data, len(data) // 2))


def change_flags(folder, **flags):
    """Sets flags that a run's checkpoint holds; those set to None are taken away."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    kept = {name: value for name, value in (state["args"] | flags).items() if name not in flags or value is not None}
    torch.save(state | dict(args=kept), folder / "checkpoint.pt")


@pytest.mark.parametrize("break_it, flags, saying", [
    (shutil.rmtree, "", "run"),
    (lambda run: (run / "checkpoint.pt").unlink(), "", "checkpoint.pt"),
    (lambda run: change_flags(run, gamma=None), "", "--gamma"),
    (lambda run: change_flags(run, env="ALE/Breakout-v5", game="Breakout"), "", "does not fit"),
    (lambda run: None, "--layers 3", "--layers is 1"),
    (lambda run: None, "--gamma 0.5", "--gamma is 0.95"),
    (lambda run: edit(run / "checkpoint.pt", lambda x, n: x[:n] + bytes(9) + x[n + 9:]), "", "damaged"),
    (lambda run: edit(run / "checkpoint.pt", lambda x, n: x[:n]), "", "checkpoint.pt"),
    (lambda run: (run / "checkpoint.pt").write_text("not a checkpoint"), "", "checkpoint.pt"),
    (lambda run: torch.save(dict(epoch=1), run / "checkpoint.pt"), "", "run"),
    (lambda run: shutil.rmtree(run / "frames"), "", "frames"),
    (lambda run: (run / "frames" / "0000030.bin").unlink(), "", "frames"),
    (lambda run: edit(run / "frames" / "0000030.bin", lambda x, n: x[:n]), "", "frames"),
], ids=["no folder", "no checkpoint", "other version", "other game", "other size", "other gamma", "zeroed bytes",
        "half a checkpoint", "text", "foreign checkpoint", "no frames", "frames missing", "half the frames"])
def test_resume_refused(whole_run, tmp_path, capfd, break_it, flags, saying):
    """A run folder that is damaged or contradicted is refused, and no file in it is touched."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    break_it(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused(capfd, ["--resume", folder, *flags.split()], saying)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("mode", ["--eval", "--dream", "--play"])
@pytest.mark.parametrize("break_it, saying", [
    (shutil.rmtree, "missing"),
    (lambda run: (run / "checkpoint.pt").unlink(), "checkpoint.pt"),
    (lambda run: (run / "checkpoint.pt").write_text("not a checkpoint"), "checkpoint.pt"),
    (lambda run: edit(run / "checkpoint.pt", lambda x, n: x[:n] + bytes(9) + x[n + 9:]), "damaged"),
    (lambda run: change_flags(run, layers=None), "does not fit"),
    (lambda run: change_flags(run, env="ALE/Breakout-v5"), "does not fit"),
    (lambda run: torch.save(dict(epoch=1), run / "checkpoint.pt"), "does not fit"),
], ids=["no folder", "no checkpoint", "text", "zeroed bytes", "other version", "other game", "foreign checkpoint"])
def test_modes_refused(whole_run, tmp_path, capfd, mode, break_it, saying):
    """What is no run of this program is refused by all that would look into one, and nothing is written."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    break_it(folder)
    before = sorted(folder.rglob("*"))
    refused(capfd, [mode, folder], folder, saying)
    assert sorted(folder.rglob("*")) == before


def test_modes_refuse_other_files(tmp_path, capfd):
    """So are files that are no checkpoint, and folders without results. Only one thing is done at a time."""
    (tmp_path / "notes.txt").write_text("Pong went well.")
    torch.save(7, tmp_path / "epoch.pt")  # the authors' runs have such files beside their checkpoints
    torch.save({"0.weight": torch.zeros(3)}, tmp_path / "other.pt")
    for mode, path in itertools.product(("--eval", "--dream", "--play"), ("notes.txt", "nothing.pt", "epoch.pt",
                                                                          "other.pt")):
        refused(capfd, [mode, tmp_path / path], tmp_path / path)
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "notes.txt"):
        refused(capfd, ["--report", path], path, "eval.json")
    refused(capfd, ["--eval", "runs/a", "--dream", "runs/a"], "--eval", "--dream")
    assert sorted(os.listdir(tmp_path)) == ["epoch.pt", "notes.txt", "other.pt"]
    for text in ('{"game": "Pong", "ret', "{}"):
        (tmp_path / "eval.json").write_text(text)
        refused(capfd, ["--report", tmp_path], tmp_path / "eval.json")


# ---- Scores: --eval and --report -------------------------------------------------------------------------------------
def test_eval_repeats_the_final_evaluation(whole_run, tmp_path, capfd):
    """--eval of a run is the evaluation that ended its training, all its numbers; published scores stand beside it."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    (folder / "eval.json").unlink()
    assert iris.main(["--eval", str(folder / "checkpoint.pt")]) == 0  # the folder is meant
    assert (folder / "eval.json").read_text() == (whole_run / "eval.json").read_text()
    told = capfd.readouterr().out.splitlines()[-1]
    score = json.loads((folder / "eval.json").read_text())["eval_return"]
    for part in (f"{score:.1f}", f"{(score + 20.7) / (14.6 + 20.7):.3f}", "-20.7", "14.6", "14.6"):
        assert part in told
        told = told.replace(part, "", 1)


@pytest.mark.parametrize("mode", ["eval", "dream", "play", "resume"])
def test_modes_of_a_resumed_run(whole_run, tmp_path, mode):
    """A run that was stopped, moved and went on is no less a run: every mode takes it, with the flags it began with."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    change_flags(folder, resume="runs/elsewhere", run="runs/elsewhere")  # as --resume runs/elsewhere left them
    args = iris.parse_args([f"--{mode}", str(folder)])
    assert {name: getattr(args, name) for name in ("eval", "dream", "play", "resume")} == {
        name: str(folder) if name == mode else None for name in ("eval", "dream", "play", "resume")}
    assert args.run == str(folder) and (args.layers, args.final_games, args.starts) == (1, 1, [1, 2, 3])


def test_eval_of_an_authors_checkpoint(tmp_path, monkeypatch, capfd):
    """An authors' checkpoint plays Klax, which is over soon and not among the 26 games: the emulator itself, given the
    same actions, shows the same frames and pays the same rewards, up to the last of the game."""
    saved = {name: fill(name, shape) for name, shape in official_shapes(18).items() if ".lpips." not in name}
    torch.save(saved, tmp_path / "Klax.pt")
    seen, evaluate = [], iris.evaluate
    monkeypatch.setattr(iris, "evaluate", lambda *args, **more: seen.append(evaluate(*args, **more)) or seen[-1])
    assert iris.main(["--eval", str(tmp_path / "Klax.pt"), "--env", "Klax", "--device", "cpu", "--final-games", "1",
                      "--horizon", "4"]) == 0
    (returns, recording), result = seen[0], json.loads((tmp_path / "Klax.results" / "eval.json").read_text())
    assert result["returns"] == returns.tolist() and result["game"] == "Klax"
    told = capfd.readouterr().out
    assert f"mean {returns.mean():.1f}" in told and "human -, IRIS -, normalised -" in told
    raw, score = RawGame("klax", noops("Klax", 0, False)), 0
    for frame, action, reward, _ in zip(*recording):
        assert not raw.ale.game_over() and (raw.frame == frame.numpy()).all()
        assert raw.step(int(action)) == reward
        score += float(reward)
    assert raw.ale.game_over() and score == returns[0] and len(recording[1].unique()) > 5
    assert {path.name for path in (tmp_path / "Klax.results" / "media" / "final").iterdir()} == PICTURES


PUBLISHED = {row[0]: [float(x) for x in row[1:]] for row in (game.split() for game in (  # random, human, five seeds
    "Alien 227.8 7127.7 368.7 452.5 437.2 331.7 510;Amidar 5.8 1719.5 196 126 164.9 162.9 65.1;"
    "Assault 222.4 742 1481.3 928.1 1121.8 1556 2534.8;Asterix 210 8503.3 762.5 1114 1082 716.5 593;"
    "BankHeist 14.2 753.1 42.2 48.8 68.4 46.4 59.6;BattleZone 2360 37187.5 16990 14570 11300 10070 12440;"
    "Boxing 0.1 12.1 86.2 49.3 55.8 83.5 75.5;Breakout 1.7 30.5 104.6 85.6 69.7 70.3 88.1;"
    "ChopperCommand 811 7387.8 1150 1276 1659 2162 1578;"
    "CrazyClimber 10780.5 35829.4 64101 66127 62740 77066 26587;"
    "DemonAttack 152.1 1971 905 2011.9 2888.5 2613.4 1753;Freeway 0 29.6 30.9 31.5 30.5 30.8 31.6;"
    "Frostbite 65.2 4334.7 274.3 250 295 250 226.3;Gopher 257.6 2412.5 2987.2 2476.8 3110.4 1171.4 1434.8;"
    "Hero 1027 30826.4 6916.2 6933.9 6740.6 7881.6 6714.7;Jamesbond 29 302.8 487.5 394 486 464 482;"
    "Kangaroo 52 3035 2249 732 750 90 370;Krull 1598 2665.5 6047.4 7364.8 4980.6 6006.3 8683;"
    "KungFuMaster 258.5 22736.3 7301 15949 34406 14372 36771;"
    "MsPacman 307.3 6951.6 1251.6 941.5 590.3 770.8 1441.1;Pong -20.7 14.6 19.3 18.5 16.6 6.2 12.4;"
    "PrivateEye 24.9 69571.3 100 100 100 100 100;Qbert 163.9 13455 853 575 790.2 1027.2 483.2;"
    "RoadRunner 11.5 7845 11355 2033 17106 7614 9965;Seaquest 68.4 42054.7 752.2 855.8 691 386 621.6;"
    "UpNDown 533.4 11693.2 3793 5367.5 2943.7 3637.9 1988.9"
).split(";"))}


def combine(games):
    """Normalised scores of each game's seeds -> what a report says of them all, by sorting and counting."""
    means, runs = sorted(sum(seeds) / len(seeds) for seeds in games), sorted(x for seeds in games for x in seeds)
    middle, cut = len(means) // 2, len(runs) // 4
    return (sum(means) / len(means), (means[middle] + means[-middle - 1]) / 2,
            sum(runs[cut:len(runs) - cut]) / (len(runs) - 2 * cut), sum(max(0, 1 - x) for x in runs) / len(runs),
            sum(x > 1 for x in means))


def read_tables(text):
    """Markdown tables -> of each one the rows below the header, as lists of cells."""
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
              for block in text.strip().split("\n\n")]
    for header, rule, *rows in tables:
        assert set(rule) == {"---"} and {len(row) for row in (header, rule, *rows)} == {len(header)}
    return [rows for _, _, *rows in tables]


def write_results(folder, scores):
    for game, seeds in scores.items():
        for i, returns in enumerate(seeds):
            path = folder / f"{game}__iris__{i}" / "eval.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(dict(game=game, returns=returns)))


def test_report_of_the_published_scores(tmp_path, capfd):
    """The authors' 26 games x 5 seeds: the mean of 1.046 and the median of 0.289 that they published; interquartile
    mean, optimality gap and games above human as counted by hand; intervals as from a naive stratified bootstrap."""
    write_results(tmp_path, {game: [[x - 1, x + 1] for x in seeds] for game, (_, _, *seeds) in PUBLISHED.items()})
    assert iris.main(["--report", str(tmp_path)]) == 0
    games, total = read_tables(capfd.readouterr().out)
    assert [row[0] for row in games] == sorted(PUBLISHED) and len(games) == 26
    normalised = []
    for game, seeds, mean, score, *beside in games:
        low, high, *returns = PUBLISHED[game]
        normalised.append([(x - low) / (high - low) for x in returns])
        assert seeds == "5" and mean == f"{sum(returns) / 5:.1f} ({', '.join(f'{x:.1f}' for x in returns)})"
        close(float(score), sum(normalised[-1]) / 5, rtol=0, atol=5.1e-4)
        close([float(x) for x in beside], [low, high, sum(returns) / 5], rtol=1e-5)
        close(iris.SCORES[game], [low, high, sum(returns) / 5], rtol=1e-6)
    assert [row[1] for row in total[:2]] == ["1.046", "0.289"]
    assert [row[0] for row in total] == ["mean", "median", "interquartile mean", "optimality gap", "games above human"]
    close([float(row[1]) for row in total], combine(normalised), rtol=0, atol=5.1e-4)
    luck, draws = random.Random(0), []
    for _ in range(1000):
        draws.append(combine([luck.choices(seeds, k=len(seeds)) for seeds in normalised]))
    for row, column in zip(total, zip(*draws)):
        column, bounds = sorted(column), [float(x) for x in row[2].split(" to ")]
        close(bounds, [column[25], column[974]], rtol=0, atol=0.1 * (column[974] - column[25]) + 1e-3)


def test_report_of_a_few_runs(tmp_path, capfd):
    """Unequal numbers of seeds; a game outside the 26 has its raw score and no part in what is said of all games; and
    alone it is a report too."""
    scores = {"Pong": [[14.6, -20.7], [14.6]], "Breakout": [[1.7], [30.5], [59.3]], "Tennis": [[-24, -23.0]]}
    write_results(tmp_path / "runs" / "deeper", scores)
    assert iris.main(["--report", str(tmp_path)]) == 0
    games, total = read_tables(capfd.readouterr().out)
    assert [row[:3] for row in games] == [["Breakout", "3", "30.5 (1.7, 30.5, 59.3)"],
                                          ["Pong", "2", "5.8 (-3.0, 14.6)"], ["Tennis", "1", "-23.5 (-23.5)"]]
    assert [row[3] for row in games] == ["1.000", "0.750", "-"]
    close([float(row[1]) for row in total], combine([[0, 1, 2], [0.5, 1]]), rtol=0, atol=5.1e-4)
    write_results(tmp_path / "alone", {"Tennis": scores["Tennis"]})
    assert iris.main(["--report", str(tmp_path / "alone")]) == 0
    assert len(read_tables(capfd.readouterr().out)) == 1


# ---- Pictures --------------------------------------------------------------------------------------------------------
PICTURES = {"reconstructions.png", "dream.png", "futures.png", "rewards.png", "dream.mp4"}


def read_video(path):
    video, images = cv2.VideoCapture(str(path)), []
    while (image := video.read()[1]) is not None:
        images.append(image[..., ::-1])
    return images


def enlarged(strip, scale=3):
    """Frames (n, 64, 64, 3) beside each other, every pixel a square of them."""
    return np.kron(np.concatenate(list(strip), axis=1), np.ones((scale, scale, 1), np.uint8))


def test_dream_of_a_run(whole_run, tmp_path):
    """--dream writes four pictures and a video that can be opened. Rows of real frames are those frames, to the pixel,
    three times as large; the difference is what the two rows above it differ by."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(folder / "media")
    assert iris.main(["--dream", str(folder)]) == 0
    assert {path.name for path in (folder / "media" / "dream").iterdir()} == PICTURES
    assert (folder / "checkpoint.pt").read_bytes() == (whole_run / "checkpoint.pt").read_bytes()
    args = iris.parse_args(["--eval", str(folder)])
    _, recording = iris.evaluate(iris.load_agent(args), args, 1)
    frames, rewards = recording[0].numpy(), recording[2].tolist()
    n, first = len(frames), next(i for i, reward in enumerate(rewards) if reward) - 2
    some, window = [int(i * (n - 1) / 9) for i in range(10)], range(first, first + 5)
    images = {name: cv2.imread(str(folder / "media" / "dream" / name))[..., ::-1] for name in PICTURES if "png" in name}
    rows = {}
    for name, height, shown, count in (("reconstructions.png", 196, some, 3), ("dream.png", 196, window, 2),
                                       ("futures.png", 196, window, 4), ("rewards.png", 214, window, 2)):
        assert images[name].shape == (count * height, 130 + 192 * len(shown), 3)
        rows[name] = [images[name][i * height + 4:i * height + 196, 130:] for i in range(count)]
        if name != "futures.png":
            assert (rows[name][0] == enlarged(frames[list(shown)])).all(), name
        for row in rows[name]:  # whatever is drawn keeps to the frames' pixels
            assert (row == row[1::3, 1::3].repeat(3, 0).repeat(3, 1)).all()
    real, rebuilt, difference = (x.astype(int) for x in rows["reconstructions.png"])
    assert (difference == abs(real - rebuilt)).all() and difference.any()
    assert len({row[:, :192].tobytes() for row in rows["futures.png"]}) == 1  # all four begin with the same frame
    video = read_video(folder / "media" / "dream" / "dream.mp4")
    assert len(video) == 1 + 16 * 3 and {image.shape for image in video} == {(406, 768, 3)}
    for image, frame in zip(video, frames):  # on the left the real frames, as well as a video keeps them
        assert abs(image[4:388, :384].astype(int) - enlarged([frame], 6)).mean() < 12


@torch.no_grad()
def test_pictures_show_what_the_model_says(monkeypatch, tmp_path):
    """Every row of the pictures against naive dreams with the same random numbers: the given actions replayed, four
    futures, expected rewards and ends; and the video's dream, which goes on from the last frames of itself."""
    agent, args = bold_agent()
    torch.manual_seed(3)
    frames, actions, H, K = torch.randint(256, (60, 64, 64, 3), dtype=torch.uint8), torch.randint(6, (60,)), 5, 16
    rewards, ends = torch.zeros(60), torch.zeros(60, dtype=torch.long)
    rewards[20], rewards[40], ends[21] = -2.0, 1.0, 1
    shown, picture, generator = [], iris.picture, torch.Generator().manual_seed(0)
    monkeypatch.setattr(iris, "picture", lambda rows, *more: shown.append(rows) or picture(rows, *more))
    iris.write_pictures(agent, args, [frames, actions, rewards, ends], tmp_path)
    tokens, _ = agent.tokenizer.look(frames)

    def imagine(words, past, count, steps, given=None):
        u, words = torch.rand(count, steps, K + 3, generator=generator), words.expand(count, -1, -1)
        return naive_dream(agent, words, past.expand(count, -1), agent.tokenizer.draw(words[:, -1]),
                           agent.actor_critic.initial_state(count), u, given)

    def same(drawn, expected):
        assert drawn.shape == (len(expected), 64, 64, 3)
        assert np.abs(drawn - ((expected + 1) * 127.5).movedim(1, -1).numpy()).max() < 1  # rounded

    (_, _, _), ((_, real, _), (_, dreamt, _)), futures, (came, expected), *video = shown
    assert (real == frames[18:23].numpy()).all()  # around the first reward
    same(dreamt, imagine(tokens[18:19], actions[:0], 1, H - 1, actions[None, 18:22])["frames"][0])
    for (_, drawn, _), future in zip(futures, imagine(tokens[18:19], actions[:0], 4, H - 1)["frames"]):
        same(drawn, future)
    assert len(futures) == 4
    _, signs, over = (x[0].softmax(-1) for x in agent.world_model.predict(tokens[None, 18:23], actions[None, 18:23]))
    assert (came[1] == frames[18:23].numpy()).all()
    same(expected[1], agent.tokenizer.draw(tokens[18:23]))
    for t in range(5):
        said = [[float(x) for x in re.findall(r"[+-]?\d+\.\d+", row[2][t])] for row in (came, expected)]
        assert said[0] == [rewards[18 + t].sign(), ends[18 + t]]
        close(said[1], [signs[t, 2] - signs[t, 0], over[t, 1]], rtol=0, atol=5.1e-3)
    words, drawn = [tokens[0]], [agent.tokenizer.draw(tokens[:1])[0]]
    while len(words) + 3 <= 50:  # dreams of 3 steps after the 3 frames before them
        t, past = len(words), min(len(words), 3)
        before, given = actions[None, t - past:t - 1], actions[None, t - 1:t + 2]
        more = imagine(torch.stack(words[-past:])[None], before, 1, 3, given)
        words, drawn = words + list(more["tokens"][0, 1:]), drawn + list(more["frames"][0, 1:])
    assert len(video) == len(words) == 49 and len({tuple(word.tolist()) for word in words}) > 20
    for t, [(_, pair, _)] in enumerate(video):
        assert (pair[0] == frames[t].numpy()).all()
        same(pair[1:], drawn[t][None])
    assert len(read_video(tmp_path / "dream.mp4")) == 49


# ---- Play ------------------------------------------------------------------------------------------------------------
def test_play(monkeypatch, capfd):
    """Scripted keys, no window: each key is its action, the world model sees the last frames and actions and no more
    than it can, rewards add up, space stops the world, R begins anew, after an end only R helps, Q leaves."""
    agent, args = bold_agent("--env", "Pong", "--stem-stride", "16", "--tokenizer-blocks", "0")
    script = ["", "f", "d", "a", "D", "A", "x", "w", " ", "f", "", " ", "d", "!", "f", "r", "a", "q"]
    taken = [0, 1, 2, 3, 4, 5, 0, 0, 0, 2, 0, 3]  # "": no key; x and w mean nothing in Pong; !: here the dream ends
    keys, shown, dreams, picture, dream = iter(script), [], [], iris.picture, iris.dream

    def press(milliseconds):
        assert 0 < milliseconds < 1000
        key = next(keys)
        if key == "!":
            press.end = True
            return 255
        return ord(key) if key else 255

    def watch(agent, tokens, past, frame, state, u, actions):
        result = dream(agent, tokens, past, frame, state, u, actions)
        result["ends"], press.end = torch.full_like(result["ends"], press.end), False
        dreams.append((tokens, past, frame, actions.item(), result))
        return result

    press.end = False
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "waitKey", press)
    monkeypatch.setattr(cv2, "imshow", lambda name, image: None)
    monkeypatch.setattr(iris, "dream", watch)
    monkeypatch.setattr(iris, "picture", lambda rows, *more: shown.append(rows[0][1:]) or picture(rows, *more))
    iris.play(agent, args)
    told = capfd.readouterr().out
    for part in ("f FIRE", "d RIGHT", "a LEFT", "D RIGHTFIRE", "A LEFTFIRE", "pause", "quit"):
        assert part in told
    assert next(keys, None) is None and len(shown) == len(script)
    assert [actions for *_, actions, _ in dreams] == taken
    for i, (tokens, past, frame, _, _) in enumerate(dreams):
        since = i if i < 11 else i - 11  # dreamt steps since the last start
        assert tokens.shape == (1, min(since + 1, 5), 16) and past[0].tolist() == taken[i - since:i][-4:][:since]
        assert torch.equal(agent.tokenizer.draw(tokens[:, -1]), frame)
        if since:
            before = dreams[i - 1]
            assert torch.equal(tokens, torch.cat([before[0], before[4]["tokens"][:, 1:]], 1)[:, -5:])
            assert torch.equal(frame, before[4]["frames"][:, 1])
    rewards = [float(result["rewards"]) for *_, result in dreams]
    scores = [f"rewards {score:+g}" for score in itertools.accumulate(rewards[:11])]
    assert len(set(scores)) > 2
    expected = ["rewards +0", *scores[:8], *[scores[7] + ", paused"] * 3, scores[8], scores[9],
                *[scores[10] + ", the end: press r"] * 2, "rewards +0", f"rewards {rewards[11]:+g}"]
    assert [captions[0] for _, captions in shown] == expected


def test_play_needs_a_display(whole_run, monkeypatch, capfd):
    """Without a display: one line that says so, and code 2."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    refused(capfd, ["--play", whole_run], "display")


@pytest.mark.skipif(not (shutil.which("Xvfb") and shutil.which("xdotool")), reason="needs Xvfb and xdotool")
def test_play_in_a_window(whole_run, tmp_path):
    """On a virtual display, with real keys: the window appears, space stops it and lets it go on, Q ends the program
    with code 0."""
    reading, writing = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(writing), "-screen", "0", "800x700x24", "-fbdir", tmp_path],
                              pass_fds=[writing], stderr=subprocess.DEVNULL)
    try:
        environment = os.environ | dict(DISPLAY=f":{os.read(reading, 10).decode().strip()}")

        def xdotool(*flags):
            return subprocess.run(["xdotool", *flags], env=environment, capture_output=True, text=True)

        def screen():
            return np.frombuffer((tmp_path / "Xvfb_screen0").read_bytes()[-800 * 700 * 4:], np.uint8)

        def wait_until(condition):
            for _ in range(300):
                if condition():
                    return
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.2)
            pytest.fail("nothing happened in a minute")

        with subprocess.Popen(command("--play", whole_run), env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: xdotool("search", "--name", "^iris$").stdout and screen().std() > 5)
            xdotool("search", "--name", "^iris$", "windowfocus")
            xdotool("key", "space")
            time.sleep(1)  # by now it stands still
            paused = screen()
            time.sleep(1)
            assert (screen() == paused).all()
            xdotool("key", "space")
            wait_until(lambda: (screen() != paused).any())  # at the least, it no longer says "paused"
            xdotool("key", "q")
            assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()  # Qt misses its fonts
            assert "FIRE" in process.stdout.read()
    finally:
        server.terminate()
        server.wait()


# ---- Benchmark: python test_iris.py --benchmark [--compare] ----------------------------------------------------------
# Speed is measured here and asserted nowhere: machines differ and are shared. The plain data flow is what one writes
# first: float32, frames encoded again for every batch, the policy stepped inside the dream with its gradient.
class Plain:
    """The updates of IRIS in the plain data flow, on a Training's networks and replay, with optimisers of its own."""

    def __init__(self, run):
        self.run, self.args, self.agent = run, run.args, run.agent.to(memory_format=torch.contiguous_format)
        self.optimizers = {part: torch.optim.Adam(net.parameters(), 1e-4) for part, net in run.agent.named_children()}

    def step(self, part, loss):
        self.optimizers[part].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(getattr(self.agent, part).parameters(), 10.0)
        self.optimizers[part].step()

    def tokenizer(self):
        index, _ = self.run.replay.sample(self.args.batches[0], 1, "start")
        x = iris.to_network(self.run.replay.frames[index[:, 0]]).contiguous()
        self.step("tokenizer", self.agent.tokenizer.loss(x, self.run.perceptual, self.args.reconstruction_loss)[0])

    def world_model(self):
        replay = self.run.replay
        index, valid = replay.sample(self.args.batches[1], self.args.sequence_length, "start")
        with torch.no_grad():
            x = iris.to_network(replay.frames[index.flatten()]).contiguous()
            tokens = self.agent.tokenizer.quantize(self.agent.tokenizer.encoder(x)).unflatten(0, index.shape)
        self.agent.world_model.train()
        self.step("world_model", self.agent.world_model.loss(
            tokens, replay.actions[index], replay.rewards[index], replay.ends[index], valid)[0])
        self.agent.world_model.eval()

    def actor_critic(self):
        """Dreams as in iris.dream, but with gradient, one position at a time and from frames encoded on the spot."""
        args, (tokenizer, world_model, policy) = self.args, self.agent.children()
        K, H, B = args.tokens_per_frame, args.horizon, args.batches[2]
        index, valid = self.run.replay.sample(B, args.burn_in + 1, "stop")
        with torch.no_grad():
            x = iris.to_network(self.run.replay.frames[index.flatten()]).contiguous()
            tokens = tokenizer.quantize(tokenizer.encoder(x))
            seen = tokenizer.draw(tokens).unflatten(0, index.shape)
            *_, state = policy(seen[:, :-1], policy.initial_state(B), valid[:, :-1])
            tokens, frame = tokens.unflatten(0, index.shape)[:, -1], seen[:, -1]
            positions, size = args.sequence_length * (K + 1), args.width // args.heads
            caches = torch.zeros(args.layers, 2, B, args.heads, positions, size, device=frame.device)
            world_model(world_model.token_embedding(tokens), caches)
        logits, values, actions, rewards, ends, position = [], [], [], [], [], K
        for t in range(H):
            policy_logits, value, state = policy(frame[:, None], state)
            logits.append(policy_logits[:, 0])
            values.append(value[:, 0])
            if t == H - 1:
                break
            with torch.no_grad():
                actions.append(torch.distributions.Categorical(logits=logits[-1]).sample())
                h = world_model(world_model.action_embedding(actions[-1])[:, None], caches, position)[:, 0]
                rewards.append(torch.distributions.Categorical(logits=world_model.head_reward(h)).sample() - 1.0)
                ends.append(torch.distributions.Categorical(logits=world_model.head_end(h)).sample().float())
                position, words = position + 1, []
                for _ in range(K):
                    words.append(torch.distributions.Categorical(logits=world_model.head_token(h)).sample())
                    h = world_model(world_model.token_embedding(words[-1])[:, None], caches, position)[:, 0]
                    position += 1
                frame = tokenizer.draw(torch.stack(words, 1))
        logits, values, actions, rewards, ends = (torch.stack(x, 1) for x in (logits, values, actions, rewards, ends))
        returns = iris.lambda_returns(rewards, values.detach(), ends, args.gamma, args.td_lambda)
        policy_now = torch.distributions.Categorical(logits=logits[:, :-1])
        advantage = returns - values[:, :-1]
        self.step("actor_critic", -(policy_now.log_prob(actions) * advantage.detach()).mean()
                  + advantage.square().mean() - args.entropy_coef * policy_now.entropy().mean())


class Kernels(TorchDispatchMode):
    """Counts the operations that make a device do something, each at least one kernel: all but views and new memory."""
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view and "empty" not in str(operation)
        return operation(*args, **kwargs or {})


def test_kernels():
    """Two products, a bias and a sum are four, whatever views lie between; and so are two products' gradients."""
    x, w = torch.ones(2, 3), torch.ones(3, 3, requires_grad=True)
    with Kernels() as kernels:
        y = (x @ w.T @ w + 1).view(3, 2).sum()
    assert kernels.count == 4
    with Kernels() as kernels:
        y.backward()
    assert 4 <= kernels.count <= 6  # the first gradient, three products, the sum of two of them


def benchmark(argv):
    """Times the phases of an epoch on real frames, and with --compare the plain data flow beside them."""
    parser = argparse.ArgumentParser(description=benchmark.__doc__, allow_abbrev=False)
    parser.add_argument("--benchmark", action="store_true")
    parser.add_argument("--compare", action="store_true", help="the plain data flow too, in the same process")
    parser.add_argument("--only", choices=("plain", "ours"), help="one data flow's updates alone, for its peak memory")
    parser.add_argument("--eager", action="store_true", help="ours without CUDA graphs")
    parser.add_argument("--lpips", action="store_true", help="with LPIPS; untrained, it takes as long")
    parser.add_argument("--frames", type=int, default=2000, help="real steps in the replay")
    parser.add_argument("--measured-updates", type=int, default=3, help="updates in one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median counts")
    options, flags = parser.parse_known_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the tests above want one
    args = iris.parse_args([*flags, "--perceptual-loss", "none", "--reconstruction-loss", "l1"])
    plan, n, gpu = types.SimpleNamespace(**vars(args)), options.measured_updates, args.device == "cuda"
    args.updates, args.collect_epochs, args.collect_steps, args.revive_codes = [n] * 3, options.frames, 1, 0
    if options.eager:
        iris.fast = lambda function, args: torch.no_grad()(torch.autocast(
            args.device, torch.bfloat16, enabled=args.mixed_precision)(function))
    run = iris.Training(args, Path(tempfile.mkdtemp()))
    run.perceptual = iris.LPIPS().to(run.device) if options.lpips else None
    rng, score, game_steps = np.random.default_rng(0), None, 0
    while run.replay.size < options.frames or score is None:  # to the end of a game, to know how long one lasts
        frame, first, action = run.game.frame, run.game.first, int(rng.integers(run.game.num_actions))
        reward, end, score = run.game.step(action)
        game_steps += run.game.number == 0
        if run.replay.size < options.frames:
            run.replay.add(frame, action, reward, end, first)
    run.epoch = args.epochs  # an epoch in which everything is due

    def median_seconds(work):
        times = []
        for repeat in range(options.repeats + 1):  # the first warms up: allocators, autotuning, CUDA graphs
            if gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            times += [time.perf_counter() - begun] if repeat else []
        return float(np.median(times))

    def collect():
        args.collect_steps, run.replay.size = 20, run.replay.size - 20  # in the place of the last ones
        run.collect()

    def imagine():
        index, valid = run.replay.sample(args.batches[2], args.burn_in + 1, "stop")
        run.imagine(index, valid, torch.rand(args.batches[2], args.horizon - 1, args.tokens_per_frame + 3,
                                             device=run.device))

    def count(work):
        """GFLOP and kernels of an update of a batch of one."""
        batches, updates, args.batches, args.updates = args.batches, args.updates, [1] * 3, [1] * 3
        with FlopCounterMode(display=False) as flops, Kernels() as kernels:
            work()
        args.batches, args.updates = batches, updates
        return flops.get_total_flops() / 1e9, kernels.count

    labels, ours, plain = dict(zip(run.optimizers, ("tokenizer", "world model", "actor-critic"))), {}, {}
    print(f"{args.game}, {args.preset} preset, {args.device}, {torch.get_num_threads()} threads, "
          f"{'bfloat16' if args.mixed_precision else 'float32'}, batches {args.batches}, {run.replay.size} real steps")
    x = torch.ones(2048, 2048, device=run.device, dtype=torch.bfloat16 if args.mixed_precision else torch.float32)
    fastest = 2 * 2048 ** 3 / median_seconds(lambda: x @ x) / 1e9
    print(f"  a product of 2048 x 2048 matrices: {fastest:.0f} GFLOP/s")
    if options.only != "plain":
        ours["replay, a frame"] = median_seconds(run.tokenize_replay) / run.replay.size
        for part, label in labels.items():
            ours[f"{label}, an update"] = median_seconds(lambda part=part: run.optimize(part)) / n
        ours["dream, of that update"] = median_seconds(imagine)
    if not options.only:
        ours["collection, a frame"] = median_seconds(collect) / (20 + args.burn_in)  # those of the burn-in cost as much
        steps = max(2, 160 // plan.eval_games)  # set-up included, which takes a share of any evaluation
        ours["evaluation, a frame"] = median_seconds(lambda: iris.evaluate(
            run.agent, args, plan.eval_games, enough=steps)) / steps / plan.eval_games
    if options.compare or options.only == "plain":
        flow = Plain(run)
        plain = {f"{label}, an update": median_seconds(getattr(flow, part)) for part, label in labels.items()}
    for label in ours or plain:
        print(f"  {label:24}" + "".join(f"{name} {times[label] * 1e3:10.2f} ms   " for name, times in (
            ("ours", ours), ("plain", plain)) if label in times)
            + (f"{plain[label] / ours[label]:6.2f} times as fast" if label in plain and label in ours else ""))
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"  peak memory {peak / 1e9:.2f} GB")
    if options.only:
        return
    print(f"  imagined frames: {args.batches[2] * args.horizon / ours['dream, of that update']:.0f} a second")
    if plain and not gpu:  # a graph hides what it does from the counters
        for (part, label), batch in zip(labels.items(), args.batches):
            (work, kernels), (plain_work, plain_kernels) = (count(update) for update in (
                lambda part=part: run.optimize(part), getattr(flow, part)))
            speed = work * batch / ours[f"{label}, an update"]
            print(f"  {label}: {work * batch:.0f} GFLOP an update at {speed:.0f} GFLOP/s, {speed / fastest:.0%} of the "
                  f"product above; plain {plain_work * batch:.0f} GFLOP, so {plain_work / work:.2f} times as fast at "
                  f"equal speed; {kernels} kernels, plain {plain_kernels}")
    # The frames that an epoch tokenizes grow from the first to the last; halfway stands for all. With batches cut, as
    # a CPU wants it, they are cut too, so that the shares of an epoch stay what they are.
    cut = args.batches[1] / iris.parse_args(["--preset", args.preset, "--device", "cpu"]).batches[1]
    real = plan.collect_epochs * plan.collect_steps / 2 * cut
    learning = {f"{label}, an update": updates for label, updates in zip(labels.values(), plan.updates)}
    game = ours["evaluation, a frame"] * game_steps  # of random play; better players' can be longer
    shares = {"collection": ours["collection, a frame"] * (plan.collect_steps + plan.burn_in),
              "replay": ours["replay, a frame"] * real,
              "evaluation": game * plan.eval_games / plan.eval_every}
    shares |= {label.split(",")[0]: ours[label] * updates for label, updates in learning.items()}
    seconds = sum(shares.values())
    print(f"  an epoch, everything on, halfway through: {seconds:.1f} s; its shares: "
          + ", ".join(f"{name} {share / seconds:.0%}" for name, share in shares.items()))
    if plain:
        same = sum(plain[label] * updates for label, updates in learning.items()) + shares["collection"] + (
            shares["evaluation"])
        print(f"  plain, the same epoch: {same:.1f} s, {same / seconds:.2f} times as long")
    total = game * plan.final_games
    for epoch in range(1, plan.epochs + 1):
        tokenizing, modelling, dreaming = (epoch >= start for start in plan.starts)
        due = dict(collection=epoch <= plan.collect_epochs, evaluation=True, replay=modelling * min(
            epoch, plan.collect_epochs) / (plan.collect_epochs / 2), tokenizer=tokenizing and (
                epoch <= plan.tokenizer_stop)) | {"world model": modelling, "actor-critic": dreaming}
        total += sum(share * due[name] for name, share in shares.items())
    print(f"  a whole run at these batches{'' if options.lpips else ', without LPIPS'}: {total / 3600:.1f} hours")


def kill_and_resume(argv):
    """Kills a run at random moments, resumes it each time, and compares what it leaves with an undisturbed run."""
    kills, flags = int(argv[argv.index("--kills") + 1]), [*SCHEDULE, "--epochs", "120", "--eval-every", "120"]
    folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
    assert finish(*flags, "--run-dir", folders[0]).returncode == 0
    for kill in range(kills + 1):
        start = ["--resume", next(folders[1].iterdir())] if kill else [*flags, "--run-dir", folders[1]]
        with subprocess.Popen(command(*start), stdout=subprocess.DEVNULL) as process:
            if kill < kills:
                while not list(folders[1].glob("*/checkpoint.pt")):  # before there is a run there is none to resume
                    time.sleep(0.01)
                time.sleep(random.uniform(2, 9))
                assert process.poll() is None, "the run ended before it could be killed"
                process.kill()
        metrics = next(folders[1].iterdir()) / "metrics.csv"
        epochs = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        print(f"  {'killed' if kill < kills else 'ended'} with {epochs} whole epochs", flush=True)
    equal = read_run(next(folders[0].iterdir())) == read_run(next(folders[1].iterdir()))
    print(f"{kills} kills, {kills} resumes: the run {'equals' if equal else 'DIFFERS FROM'} the one never stopped")
    return 0 if equal else 1


def baselines(argv):
    """What an agent has to beat: random play and each constant action, over whole games as in iris.evaluate."""
    game = argv[argv.index("--baselines") + 1]
    rng, names = np.random.default_rng(0), gymnasium.make(f"ALE/{game}-v5").unwrapped.get_action_meanings()
    for action, name in enumerate(["random", *names], start=-1):
        games = 50 if name == "random" else 3  # the emulator has no luck of its own: these three are the same
        env, scores = iris.make_env(f"ALE/{game}-v5", games, training=False), np.zeros(games)
        playing = np.ones(games, bool)
        env.reset(seed=150_000 + np.arange(games))
        while playing.any():
            actions = rng.integers(len(names), size=games) if name == "random" else np.full(games, action)
            _, rewards, terminated, truncated, _ = env.step(actions)
            scores += rewards * playing
            playing &= ~(terminated | truncated)
        interval = 1.96 * scores.std(ddof=1) / math.sqrt(games)
        print(f"{game}, {name:13}: {scores.mean():8.1f} +- {interval:.1f} (95 %), {games} games", flush=True)


def find_ball(frames):
    """Real frames of Pong (n, 64, 64, 3) -> which pixels show the ball (n, 64, 64), its row, column (n, 2) or nan."""
    contrast = frames.float() - torch.tensor([144.0, 72.0, 17.0])  # with the field's brown
    red, _, blue = contrast.unbind(-1)
    shown = (blue > 40) & (red > 0) & (blue > 1.7 * red)  # white; paddles are orange or green, and less blue than that
    shown[:, :12], shown[:, 58:] = False, False  # score and walls
    weight, line = shown * blue, torch.arange(64.0)
    total = weight.sum((1, 2))
    return shown, torch.stack([(weight.sum(2) * line).sum(1), (weight.sum(1) * line).sum(1)], 1) / total[:, None]


def test_find_ball():
    """Where find_ball sees the ball it is, as the game's own memory (bytes 49 and 54) has it, or nearly so."""
    raw, rng, frames, memory = RawGame("pong", 0), np.random.default_rng(0), [], []
    for _ in range(400):
        raw.step(int(rng.integers(6)))
        frames.append(raw.frame)
        memory.append([int(raw.ale.getRAM()[i]) for i in (54, 49)])
    (shown, place), memory = find_ball(torch.from_numpy(np.stack(frames))), torch.tensor(memory)
    seen = ~place.isnan().any(1) & (memory[:, 0] > 0)  # 0: it left the field between the two raw frames shown
    assert seen.sum() > 100 and shown.sum((1, 2)).max() <= 9  # the larger of two raw frames, each of one pixel or four
    assert (torch.corrcoef(torch.cat([place, memory], 1)[seen].T)[:2, 2:].diag() > 0.99).all()


@torch.no_grad()
def ball(argv):
    """Pong, on random play of its own: is the ball drawn? Do tokens know where it is, dreams where it goes?"""
    args = iris.parse_args(["--eval", argv[argv.index("--ball") + 1]])
    agent, game, rng, steps = iris.load_agent(args), iris.Game(args.env, 7_000_000), np.random.default_rng(0), []
    while len(steps) < 12_000:
        frame, first, action = game.frame, game.first, int(rng.integers(game.num_actions))
        game.step(action)
        steps.append((frame, action, first))
    frames, actions, firsts = (torch.from_numpy(np.stack(column)) for column in zip(*steps))
    (tokens, drawn), (shown, place) = agent.tokenizer.look(frames), find_ball(frames)
    x, seen = iris.to_network(frames).movedim(1, -1)[shown], drawn.movedim(1, -1)[shown]
    field = torch.tensor([144, 72, 17]) / 127.5 - 1
    print(f"ball: {1 - (x - seen).abs().sum() / (x - field).abs().sum():.1%} of its contrast with the field is drawn, "
          f"in {int(shown.any((1, 2)).sum())} frames that show it")
    # A linear probe: where the ball is, read off the tokens, by ridge regression on five sixths of the frames.
    known, n, V = ~place.isnan().any(1), 10_000, args.vocab_size
    words = (F.one_hot(tokens, V) > 0).flatten(1).float()
    fit = torch.arange(len(frames)) < n
    A, y = words[known & fit], place[known & fit]
    centre = y.mean(0)
    weights = A.T @ torch.linalg.solve(A @ A.T + 3 * torch.eye(len(A)), y - centre)
    def probe(tokens):
        return (F.one_hot(tokens, V) > 0).flatten(1).float() @ weights + centre
    # Segments of five real frames, and the five that follow, inside one episode, the ball in sight at both ends.
    t = torch.arange(n, len(frames) - 10)
    whole = ~torch.stack([firsts[t + i] for i in range(1, 10)]).any(0)
    t = t[whole & known[t + 3] & known[t + 4] & known[t + 9]]
    past, index = t[:, None] + torch.arange(5), t + 4
    u = torch.rand(len(t), 5, args.tokens_per_frame + 3, generator=torch.Generator().manual_seed(0))
    dreamt = iris.dream(agent, tokens[past], actions[past[:, :-1]], drawn[index],
                        agent.actor_critic.initial_state(len(t)), u, actions[t[:, None] + 4 + torch.arange(5)])
    real = place[t + 9]
    print(f"where the ball is five steps after {len(t)} frames; mean error in pixels (rows, columns) of")
    for name, guess in (("its mean place", centre.expand(len(t), 2)), ("staying where it was", place[index]),
                        ("flying straight on", place[index] + 5 * (place[index] - place[index - 1])),
                        ("the probe on the real tokens of then", probe(tokens[t + 9])),
                        ("the probe on the dreamt tokens", probe(dreamt["tokens"][:, 5]))):
        print(f"  {name:38} {(guess - real).abs().mean(0)[0]:5.1f} {(guess - real).abs().mean(0)[1]:5.1f}")


if __name__ == "__main__":
    scripts = {"--kills": kill_and_resume, "--baselines": baselines, "--benchmark": benchmark, "--ball": ball}
    sys.exit(next(script for flag, script in scripts.items() if flag in sys.argv)(sys.argv[1:]))

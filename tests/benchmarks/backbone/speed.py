"""Time and memory of our network against diffusers' SANA with the same weights, and against softmax attention.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/backbone/speed.py block --width 384 --tokens 1024`. Each case runs both sides in one
process, a pass of one after a pass of the other, and compares medians of process CPU time. Outputs are asserted to be equal: the change
that a block makes to its input within 1e-4 in float32, and 3e-2 in bfloat16, where each side is about 5e-3 from float32.

Ours runs in plain torch, and in the cases block, model and sampler once more, in the same turns, with its optional C++ kernels
("compiled"); `--kernels` has softmax and growth use them.

Columns: `theirs_ms`, `ours_ms` CPU milliseconds; `ratio` theirs / ours; `spread` the ratio of the quartiles of ours, how noisy the
machine was; `error` relative, in the Frobenius norm; `saved_mb` what the forward pass keeps for the backward pass, without parameters.

Cases:
    block    one block, forward and forward + backward, and what is saved. 300 caption tokens on both sides, none of them padding.
    model    a whole network of `--blocks`, the same.
    sampler  20 Euler steps of the whole network from one noise. The caption has 40 tokens: diffusers is given them padded to 300 with a
             mask, as SANA's pipeline does, ours padded to 80; ours projects it once.
    captions our network with captions of `--captions` tokens absorbed into the projections around them, against the same with queries and
             softmax attention of their own ("theirs" here), forward + backward, and a sampler's step.
    softmax  our block against the same block with softmax self-attention, forward + backward.
    growth   CPU time and peak memory of our block's forward + backward over `--tokens`, each in a process of its own, and the exponents
             between neighbours.
"""

import argparse
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from statistics import median, quantiles
from time import process_time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearsr.attention import CrossAttention, LinearAttention
from linearsr.backbone import Backbone
from linearsr.blocks import Block
from linearsr.conditioning import TextEmbedding
from linearsr.config import BackboneConfig
from linearsr.kernels import use_kernels
from linearsr.kernels.build import build_kernels
from linearsr.sana import from_diffusers

CROSS_HEADS = {384: 6, 1152: 16, 2240: 20}
LATENT, CAPTION, STEPS = 32, 2304, 20
Run = Callable[[], object]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class SoftmaxAttention(LinearAttention):
    """The quadratic attention that a linear one replaces, with the same projections."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        heads = self.qkv(x_BNC).view(*x_BNC.shape[:2], 3, -1, self.head_width).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def grid_of(tokens: int) -> tuple[int, int]:
    height = 2 ** (int(math.log2(tokens)) // 2)
    return height, tokens // height


def pair(width: int, blocks: int, dtype: torch.dtype) -> tuple[torch.nn.Module, Backbone]:
    """Make diffusers' network and ours with its weights."""
    from diffusers import SanaTransformer2DModel

    heads = CROSS_HEADS.get(width, width // 32)
    torch.manual_seed(0)
    theirs = SanaTransformer2DModel(
        num_attention_heads=width // 32, num_layers=blocks, num_cross_attention_heads=heads, cross_attention_head_dim=width // heads,
        cross_attention_dim=width, caption_channels=CAPTION,
    )  # fmt: skip
    shape = BackboneConfig(width=width, num_blocks=blocks, num_cross_heads=heads, caption_width=CAPTION)
    ours = Backbone(shape, latent_channels=LATENT, lr_pixels_per_token=1, caption_encoder="text")
    stem = {f"stem.{name}": value for name, value in ours.stem.state_dict().items()}
    ours.load_state_dict({**from_diffusers(theirs.state_dict(), shape), **stem})
    return theirs.to(dtype), ours.to(dtype)


def saved_mb(run: Callable[[], Tensor], modules: list[torch.nn.Module]) -> float:
    seen: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # alive until counted, so that no two share an address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    parameters = {part.untyped_storage().data_ptr() for module in modules for part in module.parameters()}
    del out
    return sum(size for address, size in seen.items() if address not in parameters) / 1e6


def compare(name: str, theirs: Run, ours: Run, repeats: int, note: str = "", compiled: Run | None = None) -> None:
    """Print a row for each of ours: medians of `repeats` interleaved runs after one to warm up."""
    sides = {"theirs": theirs, "ours": ours} | ({"compiled": compiled} if compiled is not None else {})
    times: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(repeats + 1):
        for side, run in sides.items():
            start_s = process_time()
            run()
            if index:
                times[side].append((process_time() - start_s) * 1e3)
    theirs_ms = median(times.pop("theirs"))
    for side, of_side in times.items():
        low, _, high = quantiles(of_side, n=4) if repeats > 1 else (1.0, 1.0, 1.0)
        ratio = theirs_ms / median(of_side)
        print(
            f"{name:42s} theirs_ms {theirs_ms:9.1f} {side + '_ms':11s} {median(of_side):9.1f} ratio {ratio:5.2f} "
            f"spread {high / low:4.2f} {note}",
            flush=True,
        )


def with_kernels(network: nn.Module, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return `run` with a network that computes by kernels meanwhile."""
    kernels = build_kernels()

    def switched() -> Tensor:
        use_kernels(network, kernels)
        try:
            return run()
        finally:
            use_kernels(network, None)

    return switched


def check(got: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    error = ((got - expected).float().norm() / expected.float().norm()).item()
    assert error <= TOLERANCE[dtype], error
    return f"error {error:.1e}"


def both_ways(name: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor], network: nn.Module, grad: Tensor, repeats: int) -> None:
    def quiet(run: Callable[[], Tensor]) -> Callable[[], object]:
        def forward() -> Tensor:
            with torch.no_grad():
                return run()

        return forward

    compiled = with_kernels(network, ours)
    compare(f"{name} forward", quiet(theirs), quiet(ours), repeats, compiled=quiet(compiled))
    backwards = [lambda run=run: run().backward(grad) for run in (theirs, ours, compiled)]
    compare(f"{name} forward+backward", backwards[0], backwards[1], repeats, compiled=backwards[2])


def run_block(width: int, tokens: int, dtype: torch.dtype, repeats: int) -> None:
    network, backbone = pair(width, 1, dtype)
    theirs, ours, grid = network.transformer_blocks[0], backbone.blocks[0], grid_of(tokens)
    x = torch.randn(1, tokens, width).to(dtype).requires_grad_()
    caption, modulation = torch.randn(1, 300, width).to(dtype), torch.randn(1, 6 * width).to(dtype)
    grad = torch.randn(1, tokens, width).to(dtype)

    def run_theirs() -> Tensor:
        return theirs(x, None, caption, None, modulation, *grid)

    def run_ours() -> Tensor:
        return ours(x, ours.cross.project(caption, None), modulation.view(1, 6, width), grid)

    name = f"block {width} N={tokens} {str(dtype)[6:]}"
    with torch.no_grad():
        outputs = [run() - x for run in (run_ours, with_kernels(ours, run_ours))]
        print(f"{name:42s} {check(outputs[0], run_theirs() - x, dtype)} compiled {check(outputs[1], run_theirs() - x, dtype)}")
    saved = [saved_mb(run, [theirs, ours]) for run in (run_theirs, run_ours)]
    print(f"{name:42s} theirs saved_mb {saved[0]:.1f} ours {saved[1]:.1f} ratio {saved[0] / saved[1]:.2f}")
    both_ways(name, run_theirs, run_ours, ours, grad, repeats)


def run_model(width: int, tokens: int, dtype: torch.dtype, repeats: int, blocks: int) -> None:
    theirs, ours = pair(width, blocks, dtype)
    height, across = grid_of(tokens)
    z, t = torch.randn(1, LATENT, height, across).to(dtype), torch.tensor([0.7])
    text = TextEmbedding(torch.randn(1, 300, CAPTION).to(dtype), torch.ones(1, 300, dtype=torch.bool))
    lr = torch.rand(1, 3, height, across).to(dtype)
    name = f"model {blocks} x {width} N={tokens} {str(dtype)[6:]}"

    def run_theirs() -> Tensor:
        return theirs(z, text.values, 1000 * t, return_dict=False)[0].float()

    def run_ours() -> Tensor:
        return ours(z, t, ours.prepare(lr, text))

    with torch.no_grad():
        outputs = [run() for run in (run_ours, with_kernels(ours, run_ours))]
        print(f"{name:42s} {check(outputs[0], run_theirs(), dtype)} compiled {check(outputs[1], run_theirs(), dtype)}")
    both_ways(name, run_theirs, run_ours, ours, torch.randn(1, LATENT, height, across), repeats)


def run_sampler(width: int, tokens: int, dtype: torch.dtype, repeats: int, blocks: int) -> None:
    theirs, ours = (part.eval() for part in pair(width, blocks, dtype))
    height, across = grid_of(tokens)
    noise, lr = torch.randn(1, LATENT, height, across), torch.rand(1, 3, height, across).to(dtype)
    values, real = torch.randn(1, 300, CAPTION).to(dtype), (torch.arange(300) < 40)[None]
    text = TextEmbedding(values[:, :80], real[:, :80])
    times = [1 - step / STEPS for step in range(STEPS)]

    @torch.no_grad()
    def sample(velocity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        z = noise
        for now in times:
            z = z - velocity(z, torch.tensor([now])).float() / STEPS
        return z

    def run_theirs() -> Tensor:
        return sample(lambda z, t: theirs(z.to(dtype), values, 1000 * t, encoder_attention_mask=real, return_dict=False)[0])

    def run_ours() -> Tensor:
        with torch.no_grad():
            conditioning = ours.prepare(lr, text, reused=True)
        return sample(lambda z, t: ours(z, t, conditioning))

    note = check(run_ours() - noise, run_theirs() - noise, dtype)
    compiled = with_kernels(ours, run_ours)
    note += " compiled " + check(compiled() - noise, run_theirs() - noise, dtype)
    compare(f"sampler {blocks} x {width} N={tokens} {str(dtype)[6:]}", run_theirs, run_ours, repeats, note, compiled)


def run_captions(width: int, tokens: int, dtype: torch.dtype, repeats: int, blocks: int, captions: int) -> None:
    torch.manual_seed(0)
    shape = BackboneConfig(width=width, num_blocks=blocks, num_cross_heads=CROSS_HEADS.get(width, 4), caption_width=32)
    network = Backbone(shape, latent_channels=LATENT, lr_pixels_per_token=1, caption_encoder="text").to(dtype)
    torch.nn.init.normal_(network.head.weight)
    height, across = grid_of(tokens)
    z, t, lr = torch.randn(1, LATENT, height, across).to(dtype), torch.tensor([0.7]), torch.rand(1, 3, height, across).to(dtype)
    text = TextEmbedding(torch.randn(1, captions, 32).to(dtype), torch.ones(1, captions, dtype=torch.bool))
    absorbs = CrossAttention.absorbs

    def using(absorbed: bool, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def switched() -> Tensor:
            CrossAttention.absorbs = absorbs if absorbed else lambda *_: False  # type: ignore[method-assign]
            return run()

        return switched

    theirs, ours = (using(absorbed, lambda: network(z, t, network.prepare(lr, text))) for absorbed in (False, True))
    name = f"captions {captions}: {blocks} x {width} N={tokens} {str(dtype)[6:]}"
    with torch.no_grad():
        note = check(ours(), theirs(), dtype)
        prepared = [network.prepare(lr, text, reused=absorbed) for absorbed in (False, True)]
        CrossAttention.absorbs = lambda *_: False  # type: ignore[method-assign]  # also not inside of a step
        compare(f"{name} step", lambda: network(z, t, prepared[0]), lambda: network(z, t, prepared[1]), repeats, note)
    compare(f"{name} forward+backward", lambda: theirs().sum().backward(), lambda: ours().sum().backward(), repeats)


def our_block(width: int, tokens: int, dtype: torch.dtype, *, softmax: bool = False, kernels: bool = False) -> Callable[[], None]:
    """Return a forward + backward pass of one of our blocks, with 300 caption tokens."""
    shape = BackboneConfig(width=width, num_blocks=1, num_cross_heads=CROSS_HEADS.get(width, width // 32))
    torch.manual_seed(0)
    block = Block(shape)
    if softmax:
        block.attention = SoftmaxAttention(width, shape.head_width)
    block = block.to(dtype)
    if kernels:
        use_kernels(block, build_kernels())
    x, caption = torch.randn(1, tokens, width).to(dtype).requires_grad_(), torch.randn(1, 300, width).to(dtype)
    modulation, grad = torch.randn(1, 6, width).to(dtype), torch.randn(1, tokens, width).to(dtype)
    return lambda: block(x, block.cross.project(caption, None), modulation, grid_of(tokens)).backward(grad)


def run_softmax(width: int, tokens: int, dtype: torch.dtype, repeats: int, kernels: bool) -> None:
    runs = our_block(width, tokens, dtype, softmax=True), our_block(width, tokens, dtype, kernels=kernels)
    compare(f"softmax {width} N={tokens} {str(dtype)[6:]} forward+backward", *runs, repeats)


def measure_alone(width: int, tokens: int, dtype: torch.dtype, repeats: int, kernels: bool) -> None:
    """Print median CPU milliseconds of a pass, and how far it raised the process's peak memory, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run, times = our_block(width, tokens, dtype, kernels=kernels), []
    for index in range(repeats + 1):
        start_s = process_time()
        run()
        if index:
            times.append((process_time() - start_s) * 1e3)
    print(median(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)


def run_growth(width: int, all_tokens: list[int], dtype: str, repeats: int, kernels: bool) -> None:
    rows: list[tuple[int, float, float]] = []
    for tokens in all_tokens:
        command = [sys.executable, __file__, "alone", "--width", str(width), "--tokens", str(tokens), "--dtype", dtype]
        command += ["--kernels"] if kernels else []
        done = subprocess.run([*command, "--repeats", str(repeats)], capture_output=True, text=True, check=True)
        ms, mb = map(float, done.stdout.split())
        note = ""
        if rows:
            ratio = math.log(tokens / rows[-1][0])
            note = f"exponent time {math.log(ms / rows[-1][1]) / ratio:.2f} memory {math.log(mb / rows[-1][2]) / ratio:.2f}"
        rows.append((tokens, ms, mb))
        print(f"growth {width} N={tokens:6d} {dtype} ms {ms:9.1f} peak_mb {mb:8.1f} {note}", flush=True)
    (first, ms0, mb0), (last, ms1, mb1) = rows[0], rows[-1]
    ratio = math.log(last / first)
    print(
        f"growth {width} N={first}..{last} {dtype} exponent time {math.log(ms1 / ms0) / ratio:.3f} memory {math.log(mb1 / mb0) / ratio:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Ours against diffusers' SANA and softmax attention, on one thread of a CPU.")
    parser.add_argument("case", choices=["block", "model", "sampler", "captions", "softmax", "growth", "alone"])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    if options.case == "growth":
        run_growth(options.width, options.tokens, options.dtype, options.repeats, options.kernels)
        return
    for tokens in options.tokens:
        arguments = (options.width, tokens, dtype, options.repeats)
        if options.case in ("model", "sampler"):
            {"model": run_model, "sampler": run_sampler}[options.case](*arguments, options.blocks)
        elif options.case == "captions":
            run_captions(*arguments, options.blocks, options.captions)
        elif options.case == "block":
            run_block(*arguments)
        else:
            {"softmax": run_softmax, "alone": measure_alone}[options.case](*arguments, options.kernels)


if __name__ == "__main__":
    main()

# %% [markdown]
# # From an equation to kernels
#
# Attention is one line: softmax(q kᵀ / √d) v. This lesson writes it down, then asks each backend here for the same, forward and
# backward, compares the numbers, and takes the time.

# %%
from functools import partial

from tinygpt_kernels import interpreter

interpreter.decide(
    ["triton"]
)  # without a GPU Triton's kernels are interpreted; that has to stand before torch is imported

import torch
from matplotlib.figure import Figure

from tinygpt.lessons import picture
from tinygpt_kernels import BackendError, ops, timing

torch.manual_seed(0)


# %% [markdown]
# **The equation.** Every score of every query with every key stands in memory: T² numbers a head.


# %%
def equation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of [B, T, H, D], as it is written on paper."""
    T, D = q.shape[1], q.shape[3]
    scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1) == 1, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


# %% [markdown]
# **What a kernel does instead.** It goes over the keys block by block. For each query it keeps the largest score m so far, the sum s
# of exp(score - m), and the weighted sum of values y. When a block brings a larger m, what was summed is scaled by exp(old - new):
# the softmax of a row never needs the row at once. Here for one query:

# %%
q1, keys, values = torch.randn(16), torch.randn(12, 16), torch.randn(12, 16)
m, s, y = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(16)
for k_block, v_block in zip(keys.split(4), values.split(4), strict=True):
    scores = k_block @ q1 / 16**0.5
    m_new = torch.maximum(m, scores.max())
    weights, old = (scores - m_new).exp(), (m - m_new).exp()
    s, y, m = s * old + weights.sum(), y * old + weights @ v_block, m_new
whole = (keys @ q1 / 16**0.5).softmax(0) @ values
print(f"block by block against all at once: {(y / s - whole).abs().max().item():.1e}")
assert torch.allclose(y / s, whole, atol=1e-6)

# %% [markdown]
# **The backends.** `.on(name)` asks for that backend, and it says why where it cannot. Interpreted kernels are right and very slow,
# so the comparison is small. The truth is float64.


# %%
def results(attention: object, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of q, k, v."""
    assert callable(attention)
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in small]
    out = attention(*inputs)
    (out * probe.to(dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


small = [torch.randn(1, 20, 2, 16) for _ in range(3)]
probe = torch.randn(1, 20, 2, 16)
truth = results(equation, torch.float64)
serving = []
for backend in ("reference", "torch", "cpp", "triton"):
    try:
        found = results(partial(ops.attention.on(backend), causal=True), torch.float32)
    except BackendError as reason:
        print(f"{backend:>9}: {str(reason).splitlines()[0]}")
        continue
    error = max((a - b).abs().max().item() for a, b in zip(found, truth, strict=True))
    print(f"{backend:>9}: output and gradients within {error:.1e} of float64")
    assert error < 1e-5
    serving.append(backend)
assert {"reference", "torch"} <= set(serving)

# %% [markdown]
# **The time**, forward and backward, of those that are not interpreted. The candidates take turns, so that a neighbour who disturbs
# one disturbs all. The equation's cost grows with T² in memory too; a kernel's only in arithmetic.


# %%
def step(attention: object, inputs: list[torch.Tensor]) -> None:
    """One forward and backward."""
    assert callable(attention)
    torch.autograd.grad(attention(*inputs).sum(), inputs)


LENGTHS = (64, 256, 512)
timed = [name for name in serving if not (name == "triton" and interpreter.interpreting())]
seconds: dict[str, list[float]] = {name: [] for name in ("equation", *timed)}
for T in LENGTHS:
    inputs = [torch.randn(1, T, 4, 32, requires_grad=True) for _ in range(3)]
    candidates = {"equation": partial(step, equation, inputs)}
    for name in timed:
        candidates[name] = partial(step, partial(ops.attention.on(name), causal=True), inputs)
    times = timing.interleaved(candidates, seconds=0.003, budget=1.0)
    for name, values_s in times.items():
        seconds[name].append(timing.median(values_s))
    print(f"T = {T:3}: " + ", ".join(f"{name} {1e3 * seconds[name][-1]:.2f} ms" for name in times))

# %%
figure = Figure(figsize=(6.5, 3.8), dpi=130, layout="constrained")
axes = figure.add_subplot()
for i, (name, measured) in enumerate(seconds.items()):
    places = [t + (i - (len(seconds) - 1) / 2) * 0.8 / len(seconds) for t in range(len(LENGTHS))]
    bars = axes.bar(places, [1e3 * value for value in measured], 0.76 / len(seconds), label=name)
    axes.bar_label(bars, fmt="%.1f", fontsize=7)
axes.set_yscale("log")
axes.set_xticks(range(len(LENGTHS)), [f"{T} tokens" for T in LENGTHS])
axes.set_ylabel("ms, forward and backward")
axes.set_title(f"one causal attention, T × 4 heads × 32, {torch.get_num_threads()} thread(s)", fontsize=10)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
picture(figure, "kernels")

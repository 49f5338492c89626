"""Cases around the edges of the CUDA kernels' own tiles, shares and tables, beside those that all backends are held to."""

import torch

from tinygpt_kernels.cases import Case


def norm(rows, cols, view=None):
    def build(draw):
        x = draw.normal(rows, cols) if view is None else draw.normal(rows, 2 * cols)[:, cols:]
        return (x, draw.normal(cols) + 1, draw.normal(cols)), {}

    return build


def add_norm(rows, cols):
    return lambda draw: (
        (draw.normal(rows, cols), draw.normal(rows, cols), draw.normal(cols) + 1, draw.normal(cols)),
        {},
    )


def attention(T, D, causal):
    """Grouped heads, as views of packed tensors: no two strides alike.

    One query sees 17 keys: of one key it would have no gradient, and what rounding leaves of that is measured against nothing.
    """

    def build(draw):
        q = draw.normal(1, T, 3, D)[:, :, :2]
        k, v = draw.normal(1, 17 if T == 1 else T, 2, D).split(1, dim=2)
        return (q, k, v), {"causal": causal}

    return build


def attention_qkv(T, D, causal):
    return lambda draw: ((draw.normal(1, T, 4, D), 2, 1), {"causal": causal})


def gelu(rows, cols, approximate="none", bias=None, first=0):
    """Of rows that begin `first` elements behind the beginning of memory, which is aligned."""

    def build(draw):
        x = draw.normal(rows * cols + first, scale=2.0)[first:].view(rows, cols)
        return (x, None if bias is None else draw.normal(cols, dtype=bias)), {"approximate": approximate}

    return build


def decode(S, H, K, D, lengths, view=None, **options):
    """View "layer": of a cache of all layers, whose rows lie apart; "misaligned": no row begins at a multiple of 16 bytes."""

    def build(draw):
        B = len(lengths)
        if view == "layer":
            k, v = draw.normal(B, S, 3, 2, K, D)[:, :, 1].unbind(2)
        elif view == "misaligned":
            k, v = (draw.normal(B, S, K, D + 1)[..., 1:] for _ in range(2))
        elif view == "heads first":
            k, v = (draw.normal(B, K, S, D).transpose(1, 2) for _ in range(2))
        else:
            k, v = draw.normal(B, S, K, D), draw.normal(B, S, K, D)
        return (draw.normal(B, H, D), k, v, draw.tensor(lengths)), options

    return build


def embedding(B, T, V, C, position=None):
    """Every row of the tables is used, and the last ones by most places. Positions: None, "offset" or "given"."""

    def build(draw):
        tokens = V - 1 - draw.integers(V, B * T) ** 3 // V**2
        tokens[: min(V, B * T)] = torch.arange(V)[: B * T]
        table = None if position is None else draw.normal(T, C)
        positions = draw.integers(T, B, T).index_fill_(1, torch.tensor([0]), T - 1) if position == "given" else None
        return (tokens.view(B, T), draw.normal(V, C), table), {"positions": positions, "scale": 0.7}

    return build


def tensors(sizes, offset=0):
    """What makes a list of tensors, `offset` elements behind the beginning of their memory."""
    return lambda draw, **options: [draw.normal(n + offset, **options)[offset:] for n in sizes]


def adamw(make):
    def build(draw):
        lists = (make(draw), make(draw), make(draw, scale=0.1), [t.abs() + 1e-3 for t in make(draw)])
        return lists, {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}

    return build


def losses(rows, cols, apart=0, **options):
    """Logits whose rows are `apart` elements further from each other than they are long; every third target is ignored."""

    def build(draw):
        targets = draw.integers(options.get("vocab") or cols, rows)
        targets[::3] = -100
        return (draw.normal(rows, cols + apart, scale=3.0)[:, :cols], targets), options

    return build


def linear_losses(rows, channels, cols, **options):
    def build(draw):
        weight = draw.normal(cols, channels, scale=3 * channels**-0.5)
        return (draw.normal(rows, channels), weight, draw.integers(options.get("vocab") or cols, rows)), options

    return build


# Around a vector, a piece and a block's share; more tensors than the small table holds, than the large one, and than it holds of
# gradients alone; as the last, one that begins beside a multiple of 16 bytes.
SIZES = {
    "cuda vectors and tails": tensors([1, 7, 0, 8, 9, 64, 1023]),
    "cuda pieces": tensors([2047, 2048, 2049, 4100]),
    "cuda misaligned": tensors([8, 100, 2049], offset=1),
    "cuda one large among small": tensors([3, 20000, 5]),
    "cuda nothing": tensors([0, 0]),
    "cuda 100 tensors": tensors(range(100)),
    "cuda 200 tensors": tensors([5] * 200),
    "cuda 600 tensors": tensors([3] * 600),
    "cuda 1200 tensors": tensors([2] * 1200),
}

# Around a thread's, a warp's and a block's share of a row, beyond what registers hold, more rows than blocks, rows apart.
EXTRA = [
    *(Case("layer_norm", f"cuda {r}x{c}", norm(r, c)) for r, c in
      ((3, 7), (5, 32), (4, 255), (2, 1024), (3, 1032), (2, 2056), (1, 4100), (600, 48), (2, 20000))),
    Case("layer_norm", "cuda 17x64 rows apart", norm(17, 64, "rows apart")),
    *(Case("add_layer_norm", f"cuda {r}x{c}", add_norm(r, c)) for r, c in ((5, 96), (2, 1500), (2, 2304))),
    Case("attention", "cuda D64 negative scale", lambda draw: (attention(65, 64, True)(draw)[0], {"causal": True, "scale": -0.2})),
    # Several rows in a block and several blocks in a row, rows in vectors and off their boundaries, both loops over rows.
    *(Case("gelu", f"cuda {r}x{c}{' ' + a if a == 'tanh' else ''}", gelu(r, c, a, torch.float32 if r % 2 else None))
      for r, c in ((1, 8), (7, 24), (129, 16), (40, 1032), (3, 2056), (2, 131)) for a in ("none", "tanh")),
    Case("gelu", "cuda 5x64 off the boundaries", gelu(5, 64, first=1)),
    *(Case("embedding", f"cuda {B}x{T} V{V} C{C} {p}", embedding(B, T, V, C, p)) for B, T, V, C, p in
      ((2, 17, 5, 8, None), (1, 32, 3, 5, None), (1, 33, 2, 40, "given"), (3, 129, 7, 24, "offset"), (20, 40, 2, 16, "given"),
       (9, 5, 300, 1032, "offset"), (1, 700, 1, 4, "offset"), (4, 129, 65, 7, "given"))),
    # Whole rows in vectors, edges at one end or both, rows with no whole vector, one warp, four and sixteen of them, slabs.
    *(Case("cross_entropy", f"cuda {r}x{c} {v} apart {a}", losses(r, c, a, vocab=v)) for r, c, v, a in
      ((5, 2, None, 0), (9, 7, None, 1), (6, 64, 64, 8), (3, 129, 120, 7), (4, 1024, None, 3), (2, 1025, 1001, 0),
       (2, 4104, None, 0), (3, 8197, 8193, 2), (2, 16400, 9001, 0), (2, 50257, None, 0))),
    Case("cross_entropy", "cuda 600x9", losses(600, 9, label_smoothing=0.2)),
    Case("cross_entropy", "cuda 3x2051 smoothed", losses(3, 2051, label_smoothing=0.2)),
    Case("linear_cross_entropy", "cuda 129x8x97", linear_losses(129, 8, 97, vocab=90)),
    Case("linear_cross_entropy", "cuda 70x40x33 smoothed", linear_losses(70, 40, 33, label_smoothing=0.1)),
    # Around a tile's edges, one tile and several, every head dimension that is compiled.
    *(Case(op, f"cuda T{T} D{D} {'causal' if causal else 'full'}", build(T, D, causal))
      for op, build in (("attention", attention), ("attention_qkv", attention_qkv))
      for T in (1, 17, 63, 64, 65, 129, 200) for D in (32, 64, 96, 128) for causal in (True, False)),
    # Around a slot's, a step's and a split's share of the keys; every width of a row; a whole group of heads, a part, more than one.
    *(Case("decode_attention", f"cuda S{S} H{H} K{K} D{D}", decode(S, H, K, D, lengths), False) for S, H, K, D, lengths in (
        (129, 2, 2, 16, [129, 0, 1]), (300, 2, 2, 32, [1, 300, 299]), (300, 2, 1, 64, [300, 17, 64]), (200, 8, 2, 64, [200, 65]),
        (150, 6, 1, 96, [129, 150]), (129, 1, 1, 128, [129]), (129, 5, 1, 128, [100]), (40, 3, 1, 80, [40, 900, -3]))),
    Case("decode_attention", "cuda one split", decode(20, 4, 4, 32, [20, 17, 0, 1] * 17), False),
    Case("decode_attention", "cuda no room", decode(0, 2, 2, 32, [0]), False),
    Case("decode_attention", "cuda no rows", decode(9, 2, 2, 32, []), False),
    Case("decode_attention", "cuda D20", decode(70, 4, 2, 20, [70, 33]), False),
    Case("decode_attention", "cuda D7, scaled", decode(70, 2, 2, 7, [70, 33], scale=-0.3), False),
    *(Case("decode_attention", f"cuda {view or '17x65'}", decode(65, 4, 2, 64, [17, 65], view), False)
      for view in (None, "layer", "misaligned", "heads first")),
    *(Case("adamw_", name, adamw(make), False) for name, make in SIZES.items() if "1200" not in name),
    *(Case("clip_grad_norm_", name, lambda draw, make=make: ((make(draw), 0.5), {}), False) for name, make in SIZES.items()),
]  # fmt: skip

"""DAREx once more, from the equations, slowly.

Nothing here is shared with the library. Masks are Python integers and lists of flat indices (row-major, ascending),
moments and least squares are loops over tokens and output rows in float64, a pruned delta is a dense one with zeros.

Notation: a delta D is W_F - W_P of shape [out, in]; p is the share that is DROPPED; kept values are divided by q; for
one output row i and one input x the influences are c_j = D_ij x_j, S is their sum and Q the sum of their squares.

Source: Deng et al. 2024 (DAREx, arXiv 2410.09344) as retold by the project's specification page; the numbers
A.x and C.x are sections of that page.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

WORD = 1 << 64  # arithmetic of the masks is modulo this
Q_TOP = 0.998  # where the scan of the bound solver ends
TOLERANCE = 1e-9  # what a grid point may exceed Q_TOP by, because 1 - p is rounded


# --- masks (C.4) -------------------------------------------------------------------------------------------------


def tensor_seed(global_seed: int, name: str) -> int:
    """C.4: the first 8 bytes, little-endian, of SHA-256(utf8(decimal(global_seed) + ":" + tensor_name))."""
    return int.from_bytes(hashlib.sha256(f"{global_seed:d}:{name}".encode()).digest()[:8], "little")


def mix(s: int, k: int) -> int:
    """C.4: output k (from 0) of SplitMix64 seeded with s, without running through the outputs before it."""
    x = (s + (k + 1) * 0x9E3779B97F4A7C15) % WORD
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 % WORD
    x ^= x >> 27
    x = x * 0x94D049BB133111EB % WORD
    x ^= x >> 31
    return x


def u32(s: int, k: int) -> int:
    """C.4: the high half of mix(s, k)."""
    return mix(s, k) >> 32


def threshold(num: int, den: int) -> int:
    """C.4: T = floor(num * 2^32 / den), for the density num / den."""
    return num * (1 << 32) // den


def one_of_m(seed: int, rows: int, cols: int, m: int) -> list[int]:
    """C.4 `one-of-m`: each run of m columns of a row keeps its local column (u32(seed, bucket) * m) >> 32.

    The bucket's number is row * ceil(cols / m) + b. The last bucket of a row may be short: when the column lies beyond
    the end of the row, it keeps none.
    """
    buckets = -(-cols // m)
    kept = []
    for row in range(rows):
        for b in range(buckets):
            col = b * m + ((u32(seed, row * buckets + b) * m) >> 32)
            if col < cols:
                kept.append(row * cols + col)
    return kept


def bernoulli(seed: int, rows: int, cols: int, num: int, den: int) -> list[int]:
    """C.4 `bernoulli`: the element with flat index i is kept iff u32(seed, i) < T."""
    T = threshold(num, den)
    return [i for i in range(rows * cols) if u32(seed, i) < T]


def columns(seed: int, rows: int, cols: int, num: int, den: int) -> list[int]:
    """A.2.9, one Bernoulli per input column for all rows: column j is kept iff u32(seed, j) < T."""
    T = threshold(num, den)
    alive = [j for j in range(cols) if u32(seed, j) < T]
    return [row * cols + j for row in range(rows) for j in alive]


def index_checksum(indices: Sequence[int]) -> str:
    """C.4's checksum of the index stream: SHA-256 over little-endian int64, its first 8 bytes as 16 hex digits."""
    digest = hashlib.sha256()
    for i in indices:
        digest.update(struct.pack("<q", i))
    return digest.digest()[:8].hex()


def mask_of(kept: Sequence[int], rows: int, cols: int) -> Array:
    """M of A.0: 1.0 at the flat indices in `kept`, 0.0 elsewhere."""
    M = np.zeros((rows, cols))
    for i in kept:
        M[i // cols, i % cols] = 1.0
    return M


def pruned(delta: Any, kept: Sequence[int], q: float) -> Array:
    """A.0: (M * D) / q."""
    D = np.asarray(delta, dtype=np.float64)
    return mask_of(kept, *D.shape) * D / q


# --- moments and the bound (A.1) ---------------------------------------------------------------------------------


def _sums(c: Any) -> tuple[float, float]:
    """S and Q."""
    S = Q = 0.0
    for c_j in np.asarray(c, dtype=np.float64):
        S += float(c_j)
        Q += float(c_j) ** 2
    return S, Q


def bias(c: Any, p: float, q: float) -> float:
    """A.1-1: E[h] = (1 - (1-p)/q) S, of h = sum_j c_j - sum_j M_j c_j / q."""
    S, _ = _sums(c)
    return (1 - (1 - p) / q) * S


def variance(c: Any, p: float, q: float) -> float:
    """A.1-1: Var[h] = p (1-p) / q^2 Q."""
    _, Q = _sums(c)
    return p * (1 - p) / q**2 * Q


def mean_square(c: Any, p: float, q: float) -> float:
    """A.1-1: E[h^2] = (1 - (1-p)/q)^2 S^2 + p (1-p) / q^2 Q."""
    S, Q = _sums(c)
    return (1 - (1 - p) / q) ** 2 * S**2 + p * (1 - p) / q**2 * Q


def phi(p: float) -> float:
    """A.1-3: (1 - 2p) / ln((1-p) / p), with its limits 1/2 at p = 1/2 and 0 at p = 0 and p = 1."""
    if p in (0.0, 1.0):
        return 0.0
    u = 1 - 2 * p
    return 0.5 if u == 0 else u / math.log1p(u / p)  # (1-p)/p is 1 + (1-2p)/p


def eta_bound(S: float, Q: float, p: float, q: float, eta: float, gamma: float) -> float:
    """A.1-4, right-hand side: eta (1 - (1-p)/q) S + eta^2 Phi(p) Q / (4 q^2) + ln(2/gamma)."""
    return eta * (1 - (1 - p) / q) * S + eta**2 * phi(p) * Q / (4 * q**2) + math.log(2 / gamma)


def general_bound(c: Any, p: float, q: float, eta: float, gamma: float) -> float:
    """A.1-4, bound(q; eta): what h stays under with probability >= 1 - gamma, for any eta > 0."""
    S, Q = _sums(c)
    return eta_bound(S, Q, p, q, eta, gamma) / eta


# --- q of a layer, from its inputs (A.1-5, A.1-6, A.2.5) -----------------------------------------------------------


def influence_ratio(delta: Any, X: Any) -> float:
    """A.1-5: R = sum_{x,i} sum_j (D_ij x_j)^2 / sum_{x,i} (sum_j D_ij x_j)^2, for D [out, in] and X [tokens, in].

    Without a denominator it is infinite; without either (a delta or inputs of zeros) any R would do and it is 1.
    """
    D, X = np.asarray(delta, dtype=np.float64), np.asarray(X, dtype=np.float64)
    squares = outputs = 0.0
    for x in X:
        for row in D:
            S, Q = _sums(row * x)
            squares += Q
            outputs += S**2
    if outputs == 0:
        return math.inf if squares > 0 else 1.0
    return squares / outputs


def analytic_q(delta: Any, X: Any, p: float) -> tuple[float, float]:
    """A.1-5: q* = (1-p) + p R, clamped to [1-p, 1]; and R itself, as it is."""
    R = influence_ratio(delta, X)
    q = (1 - p) + p * R if p > 0 else 1.0
    return min(max(q, 1 - p), 1.0), R


def _products(delta: Any, kept_dense: Any, X: Any) -> tuple[Array, Array]:
    """Per row i: n_i = sum_x (D x)_i (K x)_i and d_i = sum_x (K x)_i^2, where K is M * D, not yet divided by q."""
    D, K = np.asarray(delta, dtype=np.float64), np.asarray(kept_dense, dtype=np.float64)
    n, d = np.zeros(len(D)), np.zeros(len(D))
    for x in np.asarray(X, dtype=np.float64):
        for i in range(len(D)):
            full, _ = _sums(D[i] * x)
            part, _ = _sums(K[i] * x)
            n[i] += full * part
            d[i] += part * part
    return n, d


def least_squares_layer(delta: Any, kept_dense: Any, X: Any) -> float:
    """A.1-6: 1/q = <D X, K X> / |K X|^2, the factor for K = M * D. It is 0 when K X is."""
    n, d = _products(delta, kept_dense, X)
    N, D = sum(float(v) for v in n), sum(float(v) for v in d)
    return N / D if D > 0 else 0.0


def least_squares_rows(delta: Any, kept_dense: Any, X: Any, w: float = 0.0) -> Array:
    """A.1-6 per output row, shrunk towards the layer's factor N / D, N = sum n_i and D = sum d_i:

    factor_i = (n_i + w (N/D) D/rows) / (d_i + w D/rows)

    so w counts rows of average weight that have the layer's factor. A row with d_i = 0 gets N/D, which is 0 when D is.
    """
    n, d = _products(delta, kept_dense, X)
    rows = len(n)
    N, D = sum(float(v) for v in n), sum(float(v) for v in d)
    layer = N / D if D > 0 else 0.0
    factors = np.full(rows, layer)
    for i in range(rows):
        if d[i] > 0:
            factors[i] = (n[i] + w * layer * D / rows) / (d[i] + w * D / rows)
    return factors


def bound_q_rows(
    delta: Any,
    mean_inputs: Any,
    p: float,
    eta: float,
    prob: float = 0.95,
    step: float = 0.001,
    stop_share: float = 0.8,
    bias_delta: Any = None,
) -> list[float]:
    """A.2.5, steps 2 and 3: the q of each output row. See bound_q."""
    D, m = np.asarray(delta, dtype=np.float64), np.asarray(mean_inputs, dtype=np.float64)
    sums = []
    for i in range(len(D)):
        c = list(D[i] * m)
        if bias_delta is not None:
            c.append(np.asarray(bias_delta, dtype=np.float64)[i])  # one more column, of input 1
        sums.append(_sums(c))

    best = [math.inf] * len(D)
    chosen = [1 - p] * len(D)
    stopped = [False] * len(D)
    k = 0
    while (q := (1 - p) + k * step) <= Q_TOP + TOLERANCE:
        for i, (S, Q) in enumerate(sums):
            r = abs(eta_bound(S, Q, p, q, eta, 1 - prob))
            if r < best[i]:
                best[i], chosen[i] = r, q
            else:
                stopped[i] = True
        if sum(stopped) / len(D) >= stop_share:
            break
        k += 1
    return chosen


def bound_q(
    delta: Any,
    mean_inputs: Any,
    p: float,
    eta: float,
    prob: float = 0.95,
    step: float = 0.001,
    stop_share: float = 0.8,
    bias_delta: Any = None,
) -> float:
    """A.2.5, steps 2 to 4: the layer's q is the mean over rows of the q that makes the row's bound smallest:

    r_i(q) = | eta (1 - (1-p)/q) S_i + eta^2 Phi(p) Q_i / (4 q^2) + ln(2/(1-prob)) |, of c_ij = D_ij m_j

    with m the mean input, and one more c of value bias_delta_i when there is a bias.

    "Stop the scan when >= 80 % of the rows have stopped improving" is read as follows. Candidate k = 0, 1, ... is
    q = (1-p) + k * step, taken while q <= 0.998 + 1e-9. All rows look at each candidate. A row HAS STOPPED from the
    first candidate on that is not strictly smaller than the row's best before it (an equal value stops it as well; so
    the first candidate stops none), and stays stopped even if it improves later. The scan ends after, not before, the
    candidate at which stopped rows / rows >= stop_share. A row's q is that of its smallest value among ALL candidates
    scanned, those after its stop included, the smaller q among equals. If 1-p is above 0.998 there is no candidate and
    q is 1-p.
    """
    chosen = bound_q_rows(delta, mean_inputs, p, eta, prob, step, stop_share, bias_delta)
    return sum(chosen) / len(chosen)


# --- masks by importance (A.2.10) --------------------------------------------------------------------------------


def keep_count(p: float | Fraction, count: int) -> int:
    """(1-p) * count, rounded half to even; exact for a Fraction, in float64 for a float."""
    return round((1 - p) * count)


def _largest(scores: Sequence[float], k: int) -> list[int]:
    """The k positions with the largest scores, the lower position first among equals; ascending."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:k])


def magnitude_tensor(delta: Any, p: float | Fraction) -> list[int]:
    """A.2.10 MP as in DARE's code: the (1-p) share of the tensor with the largest |D_ij|, not rescaled."""
    scores = [abs(float(v)) for row in np.asarray(delta, dtype=np.float64) for v in row]
    return _largest(scores, keep_count(p, len(scores)))


def _per_row(scores: Array, p: float | Fraction) -> list[int]:
    rows, cols = scores.shape
    k = keep_count(p, cols)
    return [i * cols + j for i in range(rows) for j in _largest([float(v) for v in scores[i]], k)]


def magnitude_rows(delta: Any, p: float | Fraction) -> list[int]:
    """C.4, equal k per row: in each row the (1-p) share with the largest |D_ij|."""
    return _per_row(np.abs(np.asarray(delta, dtype=np.float64)), p)


def wanda(delta: Any, X: Any, p: float | Fraction) -> list[int]:
    """A.2.10 Wanda on deltas: score |D_ij| * |X_j|_2 over all tokens (no mean), top k within each row."""
    D, X = np.asarray(delta, dtype=np.float64), np.asarray(X, dtype=np.float64)
    scores = np.zeros(D.shape)
    for j in range(D.shape[1]):
        _, squares = _sums(X[:, j])
        for i in range(D.shape[0]):
            scores[i, j] = abs(D[i, j]) * math.sqrt(squares)
    return _per_row(scores, p)


# --- AdamR (A.2.7) -----------------------------------------------------------------------------------------------


def adamr_step(
    thetas: Sequence[Array],
    grads: Sequence[Array | None],
    ms: Sequence[Array],
    vs: Sequence[Array],
    t: int,
    anchors: Sequence[Array | None],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lam: float = 1e-4,
    l1: bool = False,
) -> tuple[list[Array], list[Array], list[Array]]:
    """A.2.7, step t = 1, 2, ... without AMSGrad; returns new (thetas, ms, vs) and leaves the old alone.

    1. m <- b1 m + (1-b1) g, v <- b2 v + (1-b2) g^2, vh = v / (1 - b2^t)
    2. z = sqrt(sum vh / elements), one number over all parameters with gradients; 1 if it is 0
    3. theta <- theta - (lr lam / z) (theta - theta_P), or sign(theta - theta_P) for L1, where sign(0) is 0
    4. theta <- theta - lr / (1 - b1^t) m / (sqrt(vh) + eps)

    A parameter whose gradient is None is left as it is and has no part in z. One whose anchor is None (it has no base
    value) has its part in z and skips 3.
    """
    b1, b2 = betas
    out_thetas, out_ms, out_vs = [a.copy() for a in thetas], [a.copy() for a in ms], [a.copy() for a in vs]
    total, elements = 0.0, 0
    vhs: dict[int, Array] = {}
    for n, g in enumerate(grads):
        if g is None:
            continue
        out_ms[n] = b1 * ms[n] + (1 - b1) * g
        out_vs[n] = b2 * vs[n] + (1 - b2) * g**2
        vhs[n] = out_vs[n] / (1 - b2**t)
        for value in vhs[n].flat:
            total += float(value)
            elements += 1
    z = math.sqrt(total / elements) if total > 0 else 1.0
    for n, vh in vhs.items():
        theta, anchor = out_thetas[n], anchors[n]
        if anchor is not None:
            pull = np.sign(theta - anchor) if l1 else theta - anchor
            theta = theta - (lr * lam / z) * pull
        out_thetas[n] = theta - lr / (1 - b1**t) * out_ms[n] / (np.sqrt(vh) + eps)
    return out_thetas, out_ms, out_vs


# --- LoRA (A.2.8) ------------------------------------------------------------------------------------------------


def lora_delta(A: Any, B: Any, scaling: float = 1.0) -> Array:
    """scaling * B A, for A [r, in] and B [out, r]; scaling is alpha / r."""
    A, B = np.asarray(A, dtype=np.float64), np.asarray(B, dtype=np.float64)
    product = np.zeros((B.shape[0], A.shape[1]))
    for i in range(product.shape[0]):
        for j in range(product.shape[1]):
            for k in range(A.shape[0]):
                product[i, j] += B[i, k] * A[k, j]
    return scaling * product


def lora_product(A: Any, B: Any, kept: Sequence[int], q: float, scaling: float = 1.0) -> Array:
    """A.2.8, the merged product as a sparse delta: M * (scaling B A) / q."""
    return pruned(lora_delta(A, B, scaling), kept, q)


def lora_factors(A: Any, B: Any, kept_A: Sequence[int], kept_B: Sequence[int], q: float) -> tuple[Array, Array]:
    """A.2.8, A and B apart: (M_A * A) / q_A and (M_B * B) / q_B with q_A = q_B = sqrt(q). Scaling stays outside."""
    return pruned(A, kept_A, math.sqrt(q)), pruned(B, kept_B, math.sqrt(q))


# --- values (C.3, C.5) -------------------------------------------------------------------------------------------


def row_groups(kept: Sequence[int], rows: int, cols: int) -> list[list[int]]:
    """For each row the positions, in the stream of kept values, of its values; a row may have none."""
    groups: list[list[int]] = [[] for _ in range(rows)]
    for position, i in enumerate(kept):
        groups[i // cols].append(position)
    return groups


def _integers(values: Any, groups: Sequence[Sequence[int]], top: int) -> tuple[Codes, Array]:
    """scale = max|v| / top per group, code = round half to even (v / scale) in [-top, top]; scale 0 has codes 0."""
    v = np.asarray(values, dtype=np.float64).ravel()
    codes, scales = np.zeros(len(v), dtype=np.int64), np.zeros(len(groups))
    for n, group in enumerate(groups):
        scale = max((abs(float(v[i])) for i in group), default=0.0) / top
        scales[n] = scale
        if scale > 0:
            for i in group:
                codes[i] = min(max(round(float(v[i]) / scale), -top), top)
    return codes, scales


def quantise_int8(values: Any, groups: Sequence[Sequence[int]]) -> tuple[Codes, Array]:
    """(codes, scales), scale = max|v| / 127 per group; a group holds positions in `values`."""
    return _integers(values, groups, 127)


def quantise_int4(values: Any, groups: Sequence[Sequence[int]]) -> tuple[Codes, Array]:
    """(codes, scales), scale = max|v| / 7 per group; a group holds positions in `values`."""
    return _integers(values, groups, 7)


def quantise_sign(values: Any, groups: Sequence[Sequence[int]]) -> tuple[Codes, Array]:
    """(codes, scales): +1 for v >= 0, else -1; scale = mean|v| per group, 0 for a group without values."""
    v = np.asarray(values, dtype=np.float64).ravel()
    codes, scales = np.zeros(len(v), dtype=np.int64), np.zeros(len(groups))
    for n, group in enumerate(groups):
        total = 0.0
        for i in group:
            total += abs(float(v[i]))
            codes[i] = 1 if v[i] >= 0 else -1
        scales[n] = total / len(group) if group else 0.0
    return codes, scales


def dequantise(codes: Codes, scales: Array, groups: Sequence[Sequence[int]]) -> Array:
    """code * scale of its group."""
    values = np.zeros(len(codes))
    for scale, group in zip(scales, groups, strict=True):
        for i in group:
            values[i] = scale * codes[i]
    return values


# --- sizes (C.2, C.3) --------------------------------------------------------------------------------------------


def index_bits(p: float, index: str, cols: int | None = None) -> float:
    """C.2, bits per PARAMETER. With `cols`, u16 also pays for its row pointers; without, as in the page's tables, not.

    gap8 is 8 (1-p) / (1 - p^255), written as 8 over the geometric sum so that p = 1 has its limit.
    """
    if index == "seed":
        return 0.0
    if index == "bitmap":
        return 1.0
    if index == "u16":
        return 16 * (1 - p) + (32 / cols if cols is not None else 0.0)
    if index == "gap8":
        return 8 / sum(p**k for k in range(255))
    raise ValueError(index)


def bytes_per_parameter(p: float, index: str, value_bits: float, cols: int | None = None) -> float:
    """C.3: (index bits + (1-p) * value bits) / 8; scales not counted."""
    return (index_bits(p, index, cols) + (1 - p) * value_bits) / 8


# --- packages (C.5) ----------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor as its bits: unsigned integers of its type's width, in its shape. The type is safetensors' name."""

    dtype: str
    bits: NDArray[Any]


WIDTHS = {8: "F64 I64 U64", 4: "F32 I32 U32", 2: "F16 BF16 I16 U16", 1: "I8 U8 BOOL"}
BYTES = {name: width for width, names in WIDTHS.items() for name in names.split()}
BLOCK = 1 << 16  # elements after which a stream of gaps starts anew
ESCAPE = 255  # the byte of a gap that moves on by itself and keeps nothing


def read_safetensors(file: Path) -> dict[str, Stored]:
    """All tensors of one file: 8 bytes of header length, a header in JSON, and the bytes of the tensors."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(raw[begin:end], dtype=f"<u{BYTES[entry['dtype']]}")
        tensors[name] = Stored(entry["dtype"], bits.reshape(entry["shape"]))
    return tensors


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of all safetensors files in a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_safetensors(file).items()}


def widen(stored: Stored) -> NDArray[np.float32]:
    """A floating-point tensor in fp32; exact, but for F64."""
    bits = np.ascontiguousarray(stored.bits)
    if stored.dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[stored.dtype]).astype(np.float32)


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """The bits of finite fp32 numbers in a type, rounded to nearest, ties to even."""
    if dtype == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        kept, lost = bits >> 16, bits & 0xFFFF
        up = (lost > 0x8000) | ((lost == 0x8000) & (kept & 1 == 1))
        return (kept + up).astype(np.uint16)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32) if dtype == "F32" else values.astype(np.float64).view(np.uint64)


def cast(stored: Stored, dtype: str) -> Stored:
    """A tensor in another type; in its own it keeps every bit."""
    return stored if stored.dtype == dtype else Stored(dtype, narrow(widen(stored), dtype))


def ungap(gaps: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """`gap8`: flat positions. Block b has the bytes from blocks[b] to blocks[b + 1], and begins before element b 2^16.

    A byte g < 255 keeps the element g + 1 further on, a byte 255 goes 255 elements on and keeps none.
    """
    kept = []
    for b in range(len(blocks) - 1):
        at = b * BLOCK - 1
        for g in gaps[blocks[b] : blocks[b + 1]]:
            if g == ESCAPE:
                at += ESCAPE
            else:
                at += g + 1
                kept.append(at)
    return kept


def positions(name: str, described: Mapping[str, Any], stored: Mapping[str, Stored]) -> list[int]:
    """Flat positions of a pruned tensor, rows are outputs; a ValueError if they are not those that were packed."""
    entry = described["tensors"][name]
    rows, cols = reversed(entry["shape"]) if entry["transposed"] else entry["shape"]
    if entry["kind"] == "seed":
        density, seed = Fraction(described["density"]), tensor_seed(described["seed"], name)
        if described["scheme"] == "one-of-m":
            kept = one_of_m(seed, rows, cols, density.denominator)
        else:
            draw = {"bernoulli": bernoulli, "columns": columns}[described["scheme"]]
            kept = draw(seed, rows, cols, density.numerator, density.denominator)
    elif entry["kind"] == "u16":
        table = stored[f"{name}.cols"].bits
        kept = [row * cols + int(col) for row in range(rows) for col in table[row]]
    elif entry["kind"] == "gap8":
        blocks = stored[f"{name}.blocks"].bits.tolist()
        kept = ungap(stored[f"{name}.gaps"].bits.tolist(), blocks)
    else:
        table = stored[f"{name}.bitmap"].bits
        kept = [row * cols + j for row in range(rows) for j in range(cols) if int(table[row, j // 8]) >> j % 8 & 1]
    if len(kept) != entry["nnz"] or index_checksum(kept) != entry["index"]:
        raise ValueError(name)
    return kept


def codes(stored: Stored, kind: str, count: int) -> NDArray[np.float32]:
    """The first `count` values without their scale: bf16 numbers, int8, int4 plus 8 (low half first), or bits."""
    raw = [int(b) for b in stored.bits]
    if kind == "bf16":
        return widen(stored)[:count]
    if kind == "int8":
        found = [b - 256 if b > 127 else b for b in raw]
    elif kind == "int4":
        found = [half - 8 for b in raw for half in (b & 15, b >> 4)]
    else:
        found = [2 * (b >> i & 1) - 1 for b in raw for i in range(8)]
    return np.array(found[:count], dtype=np.float32)


def _decode_pruned(name: str, described: Mapping[str, Any], stored: Mapping[str, Stored], base: Stored) -> Stored:
    entry = described["tensors"][name]
    rows, cols = reversed(entry["shape"]) if entry["transposed"] else entry["shape"]
    kept = positions(name, described, stored)
    v = codes(stored[f"{name}.values"], described["values"], len(kept))
    scale = widen(stored[f"{name}.scale"])[0]
    row_scale = widen(stored[f"{name}.row_scale"]) if described["scale"] == "row" else None
    before = widen(base).ravel()
    places, after = [], np.zeros(len(kept), dtype=np.float32)
    for n, i in enumerate(kept):
        row, col = divmod(i, cols)
        places.append(col * rows + row if entry["transposed"] else i)
        s = scale if row_scale is None else np.float32(scale * row_scale[row])
        after[n] = np.float32(before[places[n]] + np.float32(s * v[n]))
    bits = cast(base, entry["dtype"]).bits.flatten()
    bits[places] = narrow(after, entry["dtype"])
    return Stored(entry["dtype"], bits.reshape(entry["shape"]))


def _decode_rows(name: str, described: Mapping[str, Any], stored: Mapping[str, Stored], base: Stored) -> Stored:
    entry = described["tensors"][name]
    new, values = stored[f"{name}.new_rows"].bits, stored[f"{name}.values"]
    before = widen(base)
    bits = cast(base, entry["dtype"]).bits[: entry["shape"][0] - len(new)].copy()
    for n, row in enumerate(stored[f"{name}.row_ids"].bits.tolist()):
        if described["rows"] == "exact":
            bits[row] = values.bits[n]
        else:
            s = widen(stored[f"{name}.scale"])[n]
            bits[row] = narrow(before[row] + s * values.bits[n].view(np.int8).astype(np.float32), entry["dtype"])
    return Stored(entry["dtype"], np.concatenate([bits, new]))


def decode(folder: Path, base: Mapping[str, Stored]) -> dict[str, Stored]:
    """Every tensor of the fine-tune that a package makes of its base, by C.5's rule:

    W = cast(fp32(W_base) + fp32(s) * fp32(v)), where s is the tensor's scale, or fp32(scale * row scale)

    with product and sum each rounded to fp32. Nothing is checked but the positions.
    """
    described = json.loads((folder / "delta.json").read_text(encoding="utf-8"))
    stored = read_folder(folder)
    found = {}
    for name, entry in described["tensors"].items():
        if entry["kind"] == "same":
            found[name] = base[name]
        elif entry["kind"] == "dense":
            found[name] = stored[name]
        else:
            bring_back = _decode_rows if entry["kind"] == "rows" else _decode_pruned
            found[name] = bring_back(name, described, stored, base[name])
    return found

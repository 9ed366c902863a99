"""Times the field's attention kernels on the shapes of benches/gpu.rs: one JSON object a line.

Medians of CUDA events over rotating buffers, random data, bf16. A kernel that cannot be imported or does not take a
shape is a line with "skipped".
"""

import json
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WARM_UP, RUNS, ROTATE_BYTES = 3, 15, 256 << 20


def say(**row):
    print(json.dumps(row), flush=True)


def median_ms(run):
    for i in range(WARM_UP):
        run(i)
    times = []
    for i in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def timed(row, run, **per_ms):
    """Prints a row with the median time, and each figure of `per_ms` divided by it."""
    try:
        ms = median_ms(run)
    except Exception as error:  # a peer's refusal is a result, not a failure of the run
        say(**row, skipped=str(error).split("\n")[0][:200])
        return
    say(**row, ms=ms, **{name: value / ms for name, value in per_ms.items()})


def copy():
    source = random(1 << 29)
    target = torch.empty_like(source)
    timed({"op": "copy", "peer": "torch"}, lambda _: target.copy_(source), gbps=2 * source.nbytes / 1e6)


def prefill():
    flex = None
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex = torch.compile(flex_attention)
    except ImportError as error:
        say(op="prefill", peer="flex_attention", skipped=str(error))
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            for seq_len in (512, 1024, 2048, 4096, 8192, 16384):
                heads, batch = 2048 // head_dim, 16384 // seq_len
                q, k, v = (random(batch, heads, seq_len, head_dim) for _ in range(3))
                shape = dict(op="prefill", head_dim=head_dim, seq_len=seq_len, batch=batch, heads=heads, causal=causal)
                flops = 4 * batch * heads * seq_len * seq_len * head_dim * (0.5 if causal else 1)
                for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                    with sdpa_kernel(backend):
                        run = lambda _: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                        timed({**shape, "peer": f"torch {name}"}, run, tflops=flops / 1e9)
                if flex and seq_len in (4096, 16384):
                    mask = None
                    if causal:
                        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seq_len, seq_len)
                    run = lambda _: flex(q, k, v, block_mask=mask)
                    timed({**shape, "peer": "flex_attention"}, run, tflops=flops / 1e9)
    # Grouped heads, and long sequences.
    for seq_len, kv_heads in ((4096, 2), (16384, 2), (32768, 16), (131072, 16)):
        batch, heads, head_dim = max(1, 16384 // seq_len), 16, 128
        q = random(batch, heads, seq_len, head_dim)
        k, v = (random(batch, kv_heads, seq_len, head_dim) for _ in range(2))
        shape = dict(op="prefill", head_dim=head_dim, seq_len=seq_len, batch=batch, heads=heads, kv_heads=kv_heads, causal=True)
        flops = 2 * batch * heads * seq_len * seq_len * head_dim
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            with sdpa_kernel(backend):
                run = lambda _: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != heads)
                timed({**shape, "peer": f"torch {name}"}, run, tflops=flops / 1e9)


def flashinfer_prefill(flashinfer):
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            for seq_len in (512, 1024, 2048, 4096, 8192, 16384):
                heads, batch = 2048 // head_dim, 16384 // seq_len
                q, k, v = (random(batch * seq_len, heads, head_dim) for _ in range(3))
                indptr = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * seq_len
                space = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
                plan = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD")
                plan.plan(indptr, indptr, heads, heads, head_dim, causal=causal, q_data_type=q.dtype)
                flops = 4 * batch * heads * seq_len * seq_len * head_dim * (0.5 if causal else 1)
                shape = dict(op="prefill", head_dim=head_dim, seq_len=seq_len, batch=batch, heads=heads, causal=causal)
                timed({**shape, "peer": "flashinfer"}, lambda _: plan.run(q, k, v), tflops=flops / 1e9)


def decode():
    for batch, length in ((1, 4096), (1, 65536), (16, 4096), (16, 32768), (64, 4096)):
        bytes_ = 2 * batch * length * 8 * 128 * 2
        copies = max(1, min(8, ROTATE_BYTES // bytes_))
        kv = [(random(batch, 8, length, 128), random(batch, 8, length, 128)) for _ in range(copies)]
        shape = dict(op="decode", kv="bf16", batch=batch, len=length, q_heads=32, kv_heads=8, head_dim=128)
        # The four query heads of a KV head as four query rows: torch's fair fast form.
        q = random(batch, 8, 4, 128)
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            with sdpa_kernel(backend):
                run = lambda i: F.scaled_dot_product_attention(q, *kv[i % copies])
                timed({**shape, "peer": f"torch {name}"}, run, gbps=bytes_ / 1e6)


def flashinfer_decode(flashinfer):
    for batch, length in ((1, 4096), (1, 65536), (16, 4096), (16, 32768), (64, 4096)):
        for page_size in (1, 16, 64):
            pages = batch * length // page_size
            bytes_ = 2 * batch * length * 8 * 128 * 2
            copies = max(1, min(8, ROTATE_BYTES // bytes_))
            caches = [random(pages, 2, page_size, 8, 128) for _ in range(copies)]
            order = torch.randperm(pages, device="cuda", dtype=torch.int32)
            indptr = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * (length // page_size)
            last = torch.full((batch,), page_size, device="cuda", dtype=torch.int32)
            space = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
            plan = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
            plan.plan(indptr, order, last, 32, 8, 128, page_size, q_data_type=torch.bfloat16)
            q = random(batch, 32, 128)
            shape = dict(op="decode", kv="bf16", batch=batch, len=length, page_size=page_size)
            shape |= dict(q_heads=32, kv_heads=8, head_dim=128)
            run = lambda i: plan.run(q, caches[i % copies])
            timed({**shape, "peer": "flashinfer"}, run, gbps=bytes_ / 1e6)


MLA = ((16, 1, 32768), (16, 64, 4096), (128, 1, 32768), (128, 64, 4096))


def mla_row(heads, batch, length):
    """The row's fields, and its bytes and operations per millisecond over the figure's unit."""
    rows = batch * length
    figures = dict(gbps=rows * 576 * 2 / 1e6, tflops=rows * 2 * heads * (576 + 512) / 1e9)
    return dict(op="mla", heads=heads, batch=batch, len=length), figures


def mla():
    for heads, batch, length in MLA:
        shape, figures = mla_row(heads, batch, length)
        q, k = random(batch, 1, heads, 576), random(batch, 1, length, 576)
        # Heads so wide are two products and a softmax in torch.
        with sdpa_kernel(SDPBackend.MATH):
            run = lambda _: F.scaled_dot_product_attention(q, k, k[..., :512])
            timed({**shape, "peer": "torch math"}, run, **figures)


def flashinfer_mla(flashinfer):
    page_size = 64
    for heads, batch, length in MLA:
        shape, figures = mla_row(heads, batch, length)
        pages = batch * length // page_size
        plan = None

        def run(_):
            nonlocal plan
            if plan is None:
                space = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
                plan = flashinfer.mla.BatchMLAPagedAttentionWrapper(space)
                order = torch.randperm(pages, device="cuda", dtype=torch.int32)
                indptr = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
                lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
                tables = (indptr, indptr * (length // page_size), order, lengths)
                plan.plan(*tables, heads, 512, 64, page_size, False, 576**-0.5, torch.bfloat16, torch.bfloat16)
            plan.run(q[..., :512], q[..., 512:], k[..., :512], k[..., 512:])

        q, k = random(batch, heads, 576), random(pages, page_size, 576)
        timed({**shape, "page_size": page_size, "peer": "flashinfer"}, run, **figures)


def main():
    say(torch=torch.__version__, gpu=torch.cuda.get_device_name())
    copy()
    prefill()
    decode()
    mla()
    try:
        import flashinfer
    except ImportError as error:
        say(peer="flashinfer", skipped=str(error))
        return
    flashinfer_prefill(flashinfer)
    flashinfer_decode(flashinfer)
    flashinfer_mla(flashinfer)


if __name__ == "__main__":
    main()

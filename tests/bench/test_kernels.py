from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import kernels

FINE = (
    "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16_kernel",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT",
    "cutlass_75_tensorop_f16_s1688gemm_f16_256x128_nn_align8",
    "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_256x128_32x3_tn_align8>(Params)",
    "ampere_sgemm_128x64_tn",
    "fmha_cutlassF_f16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::half_t>::Params)",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul> >(int)",
    "void kDequantizeBlockwise<__half, 512, 64, 8, 2>(float*, unsigned char*, float*, __half*, int, int)",
    "_banded_softmax_backward",
)


def test_names_of_what_a_t4_runs_too_are_let_be() -> None:
    assert kernels.forbidden(FINE) == []


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("FlashAttention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<256>>(Flash_fwd_params)"),
        ("cuDNN", "cudnn_generated_fort_native_sdpa_sm90_fprop_wgmma_f16_knob_7_64x64x128"),
        ("bfloat16", "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN"),
        ("bfloat16", "void at::native::elementwise_kernel<128, at::native::MulFunctor<c10::BFloat16>>(int)"),
        ("bfloat16", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128>(Params)"),
        ("TF32", "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x16"),
        ("TF32", "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x256_16x3_nn_align4>(Params)"),
        ("float16 accumulation", "turing_h1688gemm_128x128_ldg8_nn"),
        ("float16 accumulation", "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize128x128x32"),
        ("tl.dot of inductor's templates", "triton_tem_fused_mm_3"),
    ],
)
def test_names_of_what_it_cannot_run_are_seen(what: str, name: str) -> None:
    assert kernels.forbidden([*FINE, name]) == [f"{what}: {name}"]


def test_kernels_are_summed_by_name_and_copies_are_none() -> None:
    events: list[dict[str, object]] = [
        {"cat": "kernel", "name": "a", "dur": 2.0},
        {"cat": "kernel", "name": "b", "dur": 5.0},
        {"cat": "kernel", "name": "a", "dur": 1.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "dur": 100.0},
        {"cat": "gpu_user_annotation", "name": "a", "dur": 100.0},
        {"name": "no category"},
    ]
    found = kernels.collect(events)
    assert found == [("b", 1, 5.0), ("a", 2, 3.0)]
    assert kernels.seconds(found) == pytest.approx(8e-6)


def test_the_file_says_what_ran(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels.json"
    kernels.write(path, [kernels.Kernel("a<b>", 2, 3.0)], {"who": "ours", "work": {"tokens": 64}})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == {"who": "ours", "work": {"tokens": 64}, "kernels": [{"name": "a<b>", "launches": 2, "total_us": 3.0}]}

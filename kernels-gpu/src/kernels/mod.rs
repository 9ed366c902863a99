//! The kernels, and the table of their entries.

mod append_kv;
mod conformance;
mod conformance_sm90;
mod decode;
mod decode_mla;
mod decode_mla_sm90;
mod layer;
mod merge_partials;
mod merge_states;
mod page_mass;
mod prefill;
mod prefill_sm90;
mod quantized;
mod sample;
mod select_pages;

use self::decode::{CodeKv, HalfKv};
use crate::abi::*;
use crate::sched::{QuantizedRing, Ring};
use crate::tile::{BF16, F16};

/// A named, printable choice of sizes.
pub trait Config {
    /// Lanes of a CTA.
    const THREADS: u32;
    /// CTAs that should fit on an SM: bounds the registers.
    const MIN_CTAS: u32;
    /// Bytes of dynamic shared memory.
    const SHARED_BYTES: u32;
    /// CTAs of a cluster, in x.
    const CLUSTER: u32 = 1;
}

const WARPS: u32 = ROWS_PER_CTA as u32;

/// A warp a row, of 128 bytes to a few KiB: enough CTAs for small batches, few enough lanes that all are resident.
struct WarpPerRow;

impl Config for WarpPerRow {
    const THREADS: u32 = 32 * WARPS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = 0;
}

/// An entry's device symbol, under a condition.
macro_rules! device_entry {
    ($when:meta, $target:literal $family:literal $name:ident($params:ty $(, $at:ident)?) = $body:path, $config:ty) => {
        // What the tool that writes the PTX out has to know, in the PTX.
        #[cfg(all(target_arch = "nvptx64", $when))]
        core::arch::global_asm!(
            concat!("// entry ", stringify!($name), " ", $family, " ", $target, " {t} {c} {s} {p} {k}"),
            t = const <$config as Config>::THREADS,
            c = const <$config as Config>::MIN_CTAS,
            s = const <$config as Config>::SHARED_BYTES,
            p = const size_of::<$params>(),
            k = const <$config as Config>::CLUSTER,
        );

        /// Device entry.
        ///
        /// # Safety
        /// Launched with the config's sizes and parameters that the host has checked.
        #[cfg(all(target_arch = "nvptx64", $when))]
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $name(p: $params) {
            $(
                // Where the parameters are: tensor maps are used by their address.
                let $at: u64;
                // SAFETY: names the entry's own parameter.
                unsafe {
                    core::arch::asm!(
                        concat!("mov.b64 {at}, ", stringify!($name), "_param_0; cvta.param.u64 {at}, {at};"),
                        at = out(reg64) $at, options(pure, nomem, nostack))
                }
            )?
            // SAFETY: the launch's promise.
            unsafe { $body(&p $(, $at)?) }
        }
    };
}

/// An entry's line of the host's table.
#[cfg(not(target_arch = "nvptx64"))]
macro_rules! host_entry {
    ($target:literal $family:literal $name:ident($params:ty $(, $at:ident)?) = $body:path, $config:ty) => {
        Entry {
            target: $target,
            family: $family,
            name: stringify!($name),
            threads: <$config>::THREADS,
            min_ctas: <$config>::MIN_CTAS,
            shared_bytes: <$config>::SHARED_BYTES,
            params_bytes: size_of::<$params>() as u32,
            cluster: <$config>::CLUSTER,
            run: |p| {
                $(let $at = p as u64;)?
                // SAFETY: the simulator passes the bytes of the entry's own parameter struct.
                unsafe { $body(&*p.cast::<$params>() $(, $at)?) }
            },
        }
    };
}

/// The one table of entries. From a line come the device symbol, the simulator's function, and the launch
/// bounds, which are inserted where the PTX is written out.
macro_rules! entries {
    ($($target:literal $family:literal $name:ident($params:ty $(, $at:ident)?) = $body:path, $config:ty;)*) => {
        $(
            device_entry! {
                ferroflash_target = $target,
                $target $family $name($params $(, $at)?) = $body, $config
            }
        )*

        /// What the host has to know of every entry, in the table's order.
        #[cfg(not(target_arch = "nvptx64"))]
        pub static ENTRIES: &[Entry] = &[$(
            host_entry! { $target $family $name($params $(, $at)?) = $body, $config },
        )*];
    };
}

/// An entry of the table.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Instruction set.
    pub target: &'static str,
    /// PTX file, with the target.
    pub family: &'static str,
    /// Symbol.
    pub name: &'static str,
    /// Lanes of a CTA.
    pub threads: u32,
    /// CTAs that should fit on an SM.
    pub min_ctas: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Bytes of the parameter struct.
    pub params_bytes: u32,
    /// CTAs of a cluster, in x.
    pub cluster: u32,
    /// One lane's run on the host.
    pub run: fn(*const u8),
}

entries! {
    "sm_80" "prefill_d64" prefill_f16_d64(AttentionParams) = prefill::body::<F16, F16, Ring<'_, 8, 128, 2>, 8, 8, 2, 4>, prefill::Config<Ring<'static, 8, 128, 2>, 8, 2, 4>;
    "sm_80" "prefill_d64" prefill_bf16_d64(AttentionParams) = prefill::body::<BF16, BF16, Ring<'_, 8, 128, 2>, 8, 8, 2, 4>, prefill::Config<Ring<'static, 8, 128, 2>, 8, 2, 4>;
    "sm_80" "prefill_d96" prefill_f16_d96(AttentionParams) = prefill::body::<F16, F16, Ring<'_, 12, 128, 2>, 12, 12, 2, 4>, prefill::Config<Ring<'static, 12, 128, 2>, 12, 2, 4>;
    "sm_80" "prefill_d96" prefill_bf16_d96(AttentionParams) = prefill::body::<BF16, BF16, Ring<'_, 12, 128, 2>, 12, 12, 2, 4>, prefill::Config<Ring<'static, 12, 128, 2>, 12, 2, 4>;
    "sm_80" "prefill_d128" prefill_f16_d128(AttentionParams) = prefill::body::<F16, F16, Ring<'_, 16, 128, 2>, 16, 16, 2, 4>, prefill::Config<Ring<'static, 16, 128, 2>, 16, 2, 4>;
    "sm_80" "prefill_d128" prefill_bf16_d128(AttentionParams) = prefill::body::<BF16, BF16, Ring<'_, 16, 128, 2>, 16, 16, 2, 4>, prefill::Config<Ring<'static, 16, 128, 2>, 16, 2, 4>;
    "sm_80" "prefill_d192" prefill_f16_d192(AttentionParams) = prefill::body::<F16, F16, Ring<'_, 24, 256, 2>, 24, 24, 1, 8>, prefill::Config<Ring<'static, 24, 256, 2>, 24, 1, 8>;
    "sm_80" "prefill_d192" prefill_bf16_d192(AttentionParams) = prefill::body::<BF16, BF16, Ring<'_, 24, 256, 2>, 24, 24, 1, 8>, prefill::Config<Ring<'static, 24, 256, 2>, 24, 1, 8>;
    "sm_80" "prefill_d256" prefill_f16_d256(AttentionParams) = prefill::body::<F16, F16, Ring<'_, 32, 128, 2>, 32, 32, 1, 4>, prefill::Config<Ring<'static, 32, 128, 2>, 32, 1, 4>;
    "sm_80" "prefill_d256" prefill_bf16_d256(AttentionParams) = prefill::body::<BF16, BF16, Ring<'_, 32, 128, 2>, 32, 32, 1, 4>, prefill::Config<Ring<'static, 32, 128, 2>, 32, 1, 4>;
    "sm_80" "decode_d64" decode_f16_d64(DecodeParams) = decode::body::<F16, HalfKv<'_, F16, 8, 8>, 8, 8>, decode::Config<HalfKv<'static, F16, 8, 8>, 8, 8>;
    "sm_80" "decode_d64" decode_bf16_d64(DecodeParams) = decode::body::<BF16, HalfKv<'_, BF16, 8, 8>, 8, 8>, decode::Config<HalfKv<'static, BF16, 8, 8>, 8, 8>;
    "sm_80" "decode_d96" decode_f16_d96(DecodeParams) = decode::body::<F16, HalfKv<'_, F16, 12, 6>, 12, 12>, decode::Config<HalfKv<'static, F16, 12, 6>, 12, 12>;
    "sm_80" "decode_d96" decode_bf16_d96(DecodeParams) = decode::body::<BF16, HalfKv<'_, BF16, 12, 6>, 12, 12>, decode::Config<HalfKv<'static, BF16, 12, 6>, 12, 12>;
    "sm_80" "decode_d128" decode_f16_d128(DecodeParams) = decode::body::<F16, HalfKv<'_, F16, 16, 4>, 16, 16>, decode::Config<HalfKv<'static, F16, 16, 4>, 16, 16>;
    "sm_80" "decode_d128" decode_bf16_d128(DecodeParams) = decode::body::<BF16, HalfKv<'_, BF16, 16, 4>, 16, 16>, decode::Config<HalfKv<'static, BF16, 16, 4>, 16, 16>;
    "sm_80" "decode_d192" decode_f16_d192(DecodeParams) = decode::body::<F16, HalfKv<'_, F16, 24, 3>, 24, 24>, decode::Config<HalfKv<'static, F16, 24, 3>, 24, 24>;
    "sm_80" "decode_d192" decode_bf16_d192(DecodeParams) = decode::body::<BF16, HalfKv<'_, BF16, 24, 3>, 24, 24>, decode::Config<HalfKv<'static, BF16, 24, 3>, 24, 24>;
    "sm_80" "decode_d256" decode_f16_d256(DecodeParams) = decode::body::<F16, HalfKv<'_, F16, 32, 2>, 32, 32>, decode::Config<HalfKv<'static, F16, 32, 2>, 32, 32>;
    "sm_80" "decode_d256" decode_bf16_d256(DecodeParams) = decode::body::<BF16, HalfKv<'_, BF16, 32, 2>, 32, 32>, decode::Config<HalfKv<'static, BF16, 32, 2>, 32, 32>;
    "sm_80" "decode_mla" decode_mla_f16(DecodeParams) = decode_mla::body::<F16, 4>, decode_mla::Config<4>;
    "sm_80" "decode_mla" decode_mla_bf16(DecodeParams) = decode_mla::body::<BF16, 4>, decode_mla::Config<4>;
    "sm_80" "decode_mla" decode_mla_f16_large(DecodeParams) = decode_mla::body::<F16, 7>, decode_mla::Config<7>;
    "sm_80" "decode_mla" decode_mla_bf16_large(DecodeParams) = decode_mla::body::<BF16, 7>, decode_mla::Config<7>;
    "sm_80" "prefill_quantized_d64" prefill_quantized_f16_d64(AttentionQuantParams) = prefill::body::<F16, F16, QuantizedRing<'_, 8, 128, 3>, 8, 8, 2, 4>, prefill::Config<QuantizedRing<'static, 8, 128, 3>, 8, 2, 4>;
    "sm_80" "prefill_quantized_d64" prefill_quantized_bf16_d64(AttentionQuantParams) = prefill::body::<BF16, F16, QuantizedRing<'_, 8, 128, 3>, 8, 8, 2, 4>, prefill::Config<QuantizedRing<'static, 8, 128, 3>, 8, 2, 4>;
    "sm_80" "prefill_quantized_d96" prefill_quantized_f16_d96(AttentionQuantParams) = prefill::body::<F16, F16, QuantizedRing<'_, 12, 128, 3>, 12, 12, 2, 4>, prefill::Config<QuantizedRing<'static, 12, 128, 3>, 12, 2, 4>;
    "sm_80" "prefill_quantized_d96" prefill_quantized_bf16_d96(AttentionQuantParams) = prefill::body::<BF16, F16, QuantizedRing<'_, 12, 128, 3>, 12, 12, 2, 4>, prefill::Config<QuantizedRing<'static, 12, 128, 3>, 12, 2, 4>;
    "sm_80" "prefill_quantized_d128" prefill_quantized_f16_d128(AttentionQuantParams) = prefill::body::<F16, F16, QuantizedRing<'_, 16, 256, 3>, 16, 16, 1, 8>, prefill::Config<QuantizedRing<'static, 16, 256, 3>, 16, 1, 8>;
    "sm_80" "prefill_quantized_d128" prefill_quantized_bf16_d128(AttentionQuantParams) = prefill::body::<BF16, F16, QuantizedRing<'_, 16, 256, 3>, 16, 16, 1, 8>, prefill::Config<QuantizedRing<'static, 16, 256, 3>, 16, 1, 8>;
    "sm_80" "prefill_quantized_d192" prefill_quantized_f16_d192(AttentionQuantParams) = prefill::body::<F16, F16, QuantizedRing<'_, 24, 256, 2>, 24, 24, 1, 8>, prefill::Config<QuantizedRing<'static, 24, 256, 2>, 24, 1, 8>;
    "sm_80" "prefill_quantized_d192" prefill_quantized_bf16_d192(AttentionQuantParams) = prefill::body::<BF16, F16, QuantizedRing<'_, 24, 256, 2>, 24, 24, 1, 8>, prefill::Config<QuantizedRing<'static, 24, 256, 2>, 24, 1, 8>;
    "sm_80" "prefill_quantized_d256" prefill_quantized_f16_d256(AttentionQuantParams) = prefill::body::<F16, F16, QuantizedRing<'_, 32, 128, 2>, 32, 32, 1, 4>, prefill::Config<QuantizedRing<'static, 32, 128, 2>, 32, 1, 4>;
    "sm_80" "prefill_quantized_d256" prefill_quantized_bf16_d256(AttentionQuantParams) = prefill::body::<BF16, F16, QuantizedRing<'_, 32, 128, 2>, 32, 32, 1, 4>, prefill::Config<QuantizedRing<'static, 32, 128, 2>, 32, 1, 4>;
    "sm_80" "decode_quantized_d64" decode_quantized_f16_d64(DecodeQuantParams) = decode::body::<F16, CodeKv<'_, 8, 4, 2, 6>, 8, 9>, decode::Config<CodeKv<'static, 8, 4, 2, 6>, 8, 9>;
    "sm_80" "decode_quantized_d64" decode_quantized_bf16_d64(DecodeQuantParams) = decode::body::<BF16, CodeKv<'_, 8, 4, 2, 6>, 8, 9>, decode::Config<CodeKv<'static, 8, 4, 2, 6>, 8, 9>;
    "sm_80" "decode_quantized_d128" decode_quantized_f16_d128(DecodeQuantParams) = decode::body::<F16, CodeKv<'_, 16, 8, 4, 3>, 16, 17>, decode::Config<CodeKv<'static, 16, 8, 4, 3>, 16, 17>;
    "sm_80" "decode_quantized_d128" decode_quantized_bf16_d128(DecodeQuantParams) = decode::body::<BF16, CodeKv<'_, 16, 8, 4, 3>, 16, 17>, decode::Config<CodeKv<'static, 16, 8, 4, 3>, 16, 17>;
    "sm_80" "decode_quantized_d256" decode_quantized_f16_d256(DecodeQuantParams) = decode::body::<F16, CodeKv<'_, 32, 16, 8, 2>, 32, 33>, decode::Config<CodeKv<'static, 32, 16, 8, 2>, 32, 33>;
    "sm_80" "decode_quantized_d256" decode_quantized_bf16_d256(DecodeQuantParams) = decode::body::<BF16, CodeKv<'_, 32, 16, 8, 2>, 32, 33>, decode::Config<CodeKv<'static, 32, 16, 8, 2>, 32, 33>;
    "sm_80" "merge" merge_partials_f16(MergePartialsParams) = merge_partials::body::<F16>, WarpPerRow;
    "sm_80" "merge" merge_partials_bf16(MergePartialsParams) = merge_partials::body::<BF16>, WarpPerRow;
    "sm_80" "merge" merge_states(MergeStatesParams) = merge_states::body, WarpPerRow;
    "sm_80" "append_kv" append_kv(AppendParams) = append_kv::append, WarpPerRow;
    "sm_80" "append_kv" page_summaries(SummaryParams) = append_kv::summaries, WarpPerRow;
    "sm_80" "quantized" append_quantized(AppendQuantParams) = quantized::append, quantized::AppendConfig;
    "sm_80" "quantized" append_tail_int4(AppendQuantParams) = quantized::append_tail, WarpPerRow;
    "sm_80" "quantized" quantize_keys_int4(AppendQuantParams) = quantized::quantize_keys, quantized::QuantizeConfig;
    "sm_80" "quantized" dequantize(DequantParams) = quantized::dequantize, WarpPerRow;
    "sm_80" "select_pages" score_pages(SelectParams) = select_pages::score, WarpPerRow;
    "sm_80" "select_pages" top_k_pages(SelectParams) = select_pages::top_k, select_pages::TopKConfig;
    "sm_80" "select_pages" page_mass_f16(PageMassParams) = page_mass::body::<F16>, WarpPerRow;
    "sm_80" "select_pages" page_mass_bf16(PageMassParams) = page_mass::body::<BF16>, WarpPerRow;
    "sm_80" "layer" rms_norm(RmsNormParams) = layer::rms_norm, layer::Config;
    "sm_80" "layer" silu_mul(SiluMulParams) = layer::silu_mul, layer::Config;
    "sm_80" "layer" embedding(EmbeddingParams) = layer::embedding, layer::Config;
    "sm_80" "sample" sample(SampleParams) = sample::body, sample::Config;
    "sm_80" "conformance" conformance(ConformanceParams) = conformance::body, conformance::Config;
    "sm_90a" "prefill_d64" prefill_sm90_f16_d64(PrefillSm90Params, at) = prefill_sm90::body::<F16, false, 128, 160, 8, 8, 20, 10, 8>, prefill_sm90::Layout<128, 160, 8, 8>;
    "sm_90a" "prefill_d64" prefill_sm90_f16_d64_extras(PrefillSm90Params, at) = prefill_sm90::body::<F16, true, 128, 160, 8, 8, 20, 10, 8>, prefill_sm90::Layout<128, 160, 8, 8>;
    "sm_90a" "prefill_d64" prefill_sm90_bf16_d64(PrefillSm90Params, at) = prefill_sm90::body::<BF16, false, 128, 160, 8, 8, 20, 10, 8>, prefill_sm90::Layout<128, 160, 8, 8>;
    "sm_90a" "prefill_d64" prefill_sm90_bf16_d64_extras(PrefillSm90Params, at) = prefill_sm90::body::<BF16, true, 128, 160, 8, 8, 20, 10, 8>, prefill_sm90::Layout<128, 160, 8, 8>;
    "sm_90a" "prefill_d96" prefill_sm90_f16_d96(PrefillSm90Params, at) = prefill_sm90::body::<F16, false, 128, 128, 12, 12, 16, 8, 12>, prefill_sm90::Layout<128, 128, 12, 12>;
    "sm_90a" "prefill_d96" prefill_sm90_f16_d96_extras(PrefillSm90Params, at) = prefill_sm90::body::<F16, true, 128, 128, 12, 12, 16, 8, 12>, prefill_sm90::Layout<128, 128, 12, 12>;
    "sm_90a" "prefill_d96" prefill_sm90_bf16_d96(PrefillSm90Params, at) = prefill_sm90::body::<BF16, false, 128, 128, 12, 12, 16, 8, 12>, prefill_sm90::Layout<128, 128, 12, 12>;
    "sm_90a" "prefill_d96" prefill_sm90_bf16_d96_extras(PrefillSm90Params, at) = prefill_sm90::body::<BF16, true, 128, 128, 12, 12, 16, 8, 12>, prefill_sm90::Layout<128, 128, 12, 12>;
    "sm_90a" "prefill_d128" prefill_sm90_f16_d128(PrefillSm90Params, at) = prefill_sm90::body::<F16, false, 128, 128, 16, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 16, 16>;
    "sm_90a" "prefill_d128" prefill_sm90_f16_d128_extras(PrefillSm90Params, at) = prefill_sm90::body::<F16, true, 128, 128, 16, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 16, 16>;
    "sm_90a" "prefill_d128" prefill_sm90_bf16_d128(PrefillSm90Params, at) = prefill_sm90::body::<BF16, false, 128, 128, 16, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 16, 16>;
    "sm_90a" "prefill_d128" prefill_sm90_bf16_d128_extras(PrefillSm90Params, at) = prefill_sm90::body::<BF16, true, 128, 128, 16, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 16, 16>;
    "sm_90a" "prefill_d192_128" prefill_sm90_f16_d192_128(PrefillSm90Params, at) = prefill_sm90::body::<F16, false, 128, 128, 24, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 24, 16>;
    "sm_90a" "prefill_d192_128" prefill_sm90_f16_d192_128_extras(PrefillSm90Params, at) = prefill_sm90::body::<F16, true, 128, 128, 24, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 24, 16>;
    "sm_90a" "prefill_d192_128" prefill_sm90_bf16_d192_128(PrefillSm90Params, at) = prefill_sm90::body::<BF16, false, 128, 128, 24, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 24, 16>;
    "sm_90a" "prefill_d192_128" prefill_sm90_bf16_d192_128_extras(PrefillSm90Params, at) = prefill_sm90::body::<BF16, true, 128, 128, 24, 16, 16, 8, 16>, prefill_sm90::Layout<128, 128, 24, 16>;
    "sm_90a" "prefill_d192" prefill_sm90_f16_d192(PrefillSm90Params, at) = prefill_sm90::body::<F16, false, 128, 96, 24, 24, 12, 6, 24>, prefill_sm90::Layout<128, 96, 24, 24>;
    "sm_90a" "prefill_d192" prefill_sm90_f16_d192_extras(PrefillSm90Params, at) = prefill_sm90::body::<F16, true, 128, 96, 24, 24, 12, 6, 24>, prefill_sm90::Layout<128, 96, 24, 24>;
    "sm_90a" "prefill_d192" prefill_sm90_bf16_d192(PrefillSm90Params, at) = prefill_sm90::body::<BF16, false, 128, 96, 24, 24, 12, 6, 24>, prefill_sm90::Layout<128, 96, 24, 24>;
    "sm_90a" "prefill_d192" prefill_sm90_bf16_d192_extras(PrefillSm90Params, at) = prefill_sm90::body::<BF16, true, 128, 96, 24, 24, 12, 6, 24>, prefill_sm90::Layout<128, 96, 24, 24>;
    "sm_90a" "prefill_d256" prefill_sm90_f16_d256(PrefillSm90Params, at) = prefill_sm90::body::<F16, false, 128, 64, 32, 32, 8, 4, 32>, prefill_sm90::Layout<128, 64, 32, 32>;
    "sm_90a" "prefill_d256" prefill_sm90_f16_d256_extras(PrefillSm90Params, at) = prefill_sm90::body::<F16, true, 128, 64, 32, 32, 8, 4, 32>, prefill_sm90::Layout<128, 64, 32, 32>;
    "sm_90a" "prefill_d256" prefill_sm90_bf16_d256(PrefillSm90Params, at) = prefill_sm90::body::<BF16, false, 128, 64, 32, 32, 8, 4, 32>, prefill_sm90::Layout<128, 64, 32, 32>;
    "sm_90a" "prefill_d256" prefill_sm90_bf16_d256_extras(PrefillSm90Params, at) = prefill_sm90::body::<BF16, true, 128, 64, 32, 32, 8, 4, 32>, prefill_sm90::Layout<128, 64, 32, 32>;
    "sm_90a" "decode_mla" decode_mla_sm90_f16(DecodeMlaSm90Params, at) = decode_mla_sm90::body::<F16>, decode_mla_sm90::Config;
    "sm_90a" "decode_mla" decode_mla_sm90_bf16(DecodeMlaSm90Params, at) = decode_mla_sm90::body::<BF16>, decode_mla_sm90::Config;
    "sm_90a" "conformance" conformance_sm90(ConformanceSm90Params, at) = conformance_sm90::body, conformance_sm90::Config;
    "sm_90a" "conformance" conformance_sm90_cluster(ConformanceSm90Params, at) = conformance_sm90::cluster, conformance_sm90::Cluster;
    "sm_90a" "conformance" conformance_sm90_roles(ConformanceSm90Params, at) = conformance_sm90::roles, conformance_sm90::Roles;
}

/// Other tiles of Hopper's prefill, for bf16 without extras: what a search compares with those in use. On the device they
/// are compiled with a cfg of their own, so that no PTX of theirs is in the crate.
macro_rules! alternatives {
    ($($name:ident = $m:literal $n:literal $chunks:literal $v_chunks:literal $s:literal $steps:literal $o:literal;)*) => {
        $(
            device_entry! {
                all(ferroflash_alternatives, ferroflash_target = "sm_90a"),
                "sm_90a" "alternatives" $name(PrefillSm90Params, at) =
                    prefill_sm90::body::<BF16, false, $m, $n, $chunks, $v_chunks, $s, $steps, $o>,
                    prefill_sm90::Layout<$m, $n, $chunks, $v_chunks>
            }
        )*

        /// The other tiles, each with its entry.
        #[cfg(not(target_arch = "nvptx64"))]
        pub static ALTERNATIVES: &[(PrefillTile, Entry)] = &[$(
            (
                PrefillTile {
                    name: stringify!($name),
                    entries: [["", ""], [stringify!($name), ""]],
                    head_dim: 8 * $chunks,
                    v_head_dim: 8 * $v_chunks,
                    rows: $m,
                    block: $n,
                    why: "not in use",
                },
                host_entry! {
                    "sm_90a" "alternatives" $name(PrefillSm90Params, at) =
                        prefill_sm90::body::<BF16, false, $m, $n, $chunks, $v_chunks, $s, $steps, $o>,
                        prefill_sm90::Layout<$m, $n, $chunks, $v_chunks>
                },
            ),
        )*];
    };
}

alternatives! {
    alternative_d64_64_128x128 = 128 128 8 8 16 8 8;
    alternative_d64_64_128x176 = 128 176 8 8 22 11 8;
    alternative_d64_64_192x80 = 192 80 8 8 10 5 8;
    alternative_d64_64_192x96 = 192 96 8 8 12 6 8;
    alternative_d96_96_128x144 = 128 144 12 12 18 9 12;
    alternative_d96_96_128x160 = 128 160 12 12 20 10 12;
    alternative_d128_128_128x112 = 128 112 16 16 14 7 16;
    alternative_d128_128_128x144 = 128 144 16 16 18 9 16;
    alternative_d128_128_128x176 = 128 176 16 16 22 11 16;
    alternative_d192_128_128x112 = 128 112 24 16 14 7 16;
    alternative_d192_192_128x112 = 128 112 24 24 14 7 24;
    alternative_d256_256_128x80 = 128 80 32 32 10 5 32;
}

#[cfg(all(test, not(target_arch = "nvptx64")))]
mod tests {
    use super::*;

    #[test]
    fn decode_entries_have_the_slots() {
        for (head_dim, slots) in DECODE_SLOTS {
            for dtype in ["f16", "bf16"] {
                let name = std::format!("decode_{dtype}_d{head_dim}");
                let entry = ENTRIES.iter().find(|e| e.name == name).unwrap();
                assert_eq!(entry.threads as usize, 32 * DECODE_WARPS);
                // Rings, and a state of 16 rows in f32; beside these, rows' addresses, places and a state's maxima and sums.
                let stages = DECODE_WARPS * slots * 16 * 2 * head_dim;
                let rest = entry.shared_bytes as usize - stages - 64 * head_dim;
                assert!((1024 * DECODE_WARPS..1536 * DECODE_WARPS).contains(&rest), "{name}: {rest}");
            }
        }
    }

    #[test]
    fn decode_entries_of_codes_have_the_slots() {
        for (head_dim, slots) in DECODE_QUANTIZED_SLOTS {
            for dtype in ["f16", "bf16"] {
                let name = std::format!("decode_quantized_{dtype}_d{head_dim}");
                let entry = ENTRIES.iter().find(|e| e.name == name).unwrap();
                // 40 bytes for each channel: 64 tokens of int4 K with two groups of minima and scales.
                let rest = entry.shared_bytes as usize - DECODE_WARPS * slots * 40 * head_dim - 64 * head_dim;
                assert!((256 * DECODE_WARPS..1536 * DECODE_WARPS).contains(&rest), "{name}: {rest}");
            }
        }
    }

    #[test]
    fn hoppers_prefill_entries_are_the_tiles() {
        let entries = || ENTRIES.iter().filter(|e| e.name.starts_with("prefill_sm90"));
        assert_eq!(entries().count(), 4 * PREFILL_SM90.len());
        for tile in PREFILL_SM90 {
            for name in tile.entries.as_flattened() {
                let entry = entries().find(|e| e.name == *name).unwrap();
                assert_eq!(entry.threads as usize, 128 * (1 + tile.rows / 64));
                let channels = tile.rows * tile.head_dim + 2 * tile.block * (tile.head_dim + tile.v_head_dim);
                // Beside the tiles, items and barriers.
                assert!(entry.shared_bytes as usize - 2 * channels < 512, "{name}");
            }
        }
    }
}

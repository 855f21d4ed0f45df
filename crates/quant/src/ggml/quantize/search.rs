//! ggml's small searches for a group's scale, operation for operation.

/// Below this a group counts as zero.
pub(super) const EPSILON: f32 = 1e-15;

/// The nearest integer of a number below 2^22 in magnitude, ties to even, by the bits of a sum.
pub(super) fn nearest(value: f32) -> i32 {
    ((value + 12_582_912.0).to_bits() & 0x007F_FFFF) as i32 - 0x0040_0000
}

/// The first value of a magnitude above zero that no later one exceeds, with its magnitude.
fn peak(x: &[f32]) -> (f32, f32) {
    let max = super::largest(x);
    (max, max.abs())
}

/// `make_qx_quants` with squares as weights: a scale about zero for codes from `-n` to `n - 1`, the best of nineteen, and the
/// codes plus `n`.
pub(super) fn symmetric<const N: usize>(x: &[f32; N], n: i32, codes: &mut [u8; N]) -> f32 {
    let (max, amax) = peak(x);
    *codes = [0; N];
    if amax < EPSILON {
        return 0.0;
    }
    let level = |iscale: f32, x: f32| nearest(iscale * x).clamp(-n, n - 1);
    let sums = |iscale: f32| {
        let (mut lx, mut l2) = (0.0_f32, 0.0_f32);
        for &x in x {
            let l = level(iscale, x) as f32;
            let w = x * x;
            lx += w * x * l;
            l2 += w * l * l;
        }
        (lx, l2)
    };
    let mut iscale = -(n as f32) / max;
    let (lx, l2) = sums(iscale);
    let mut scale = if l2 == 0.0 { 0.0 } else { lx / l2 };
    let mut best = scale * lx;
    for step in (-9..=9).filter(|&step| step != 0) {
        let tried = -(n as f32 + 0.1 * step as f32) / max;
        let (lx, l2) = sums(tried);
        if l2 > 0.0 && lx * lx > best * l2 {
            (iscale, scale) = (tried, lx / l2);
            best = scale * lx;
        }
    }
    *codes = x.map(|x| (level(iscale, x) + n) as u8);
    scale
}

/// `make_q3_quants`: a scale about zero for codes from -4 to 3, and the codes plus 4, by moving one code at a time.
pub(super) fn three_bits(x: &[f32; 16], codes: &mut [u8; 16]) -> f32 {
    const N: i32 = 4;
    let (max, amax) = peak(x);
    *codes = [0; 16];
    if amax < EPSILON {
        return 0.0;
    }
    let iscale = -(N as f32) / max;
    let mut levels = x.map(|x| nearest(iscale * x).clamp(-N, N - 1) as f32);
    let (mut sumlx, mut suml2) = (0.0_f32, 0.0_f32);
    for (&x, &l) in x.iter().zip(&levels) {
        let w = x * x;
        sumlx += w * x * l;
        suml2 += w * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (&x, level) in x.iter().zip(&mut levels) {
            let w = x * x;
            let mut lx = sumlx - w * x * *level;
            if lx <= 0.0 || lx.is_nan() {
                continue;
            }
            let mut l2 = suml2 - w * *level * *level;
            let new = nearest(x * l2 / lx).clamp(-N, N - 1) as f32;
            if new == *level {
                continue;
            }
            lx += w * x * new;
            l2 += w * new * new;
            if l2 > 0.0 && lx * lx * suml2 > sumlx * sumlx * l2 {
                (*level, sumlx, suml2) = (new, lx, l2);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    *codes = levels.map(|level| (level as i32 + N) as u8);
    if suml2 > 0.0 { sumlx / suml2 } else { 0.0 }
}

/// How [`affine`] looks for its scale.
pub(super) struct Affine {
    /// The largest code.
    pub most: i32,
    pub first: f32,
    pub step: f32,
    pub steps: i32,
    /// Weighs magnitudes of errors, not squares.
    pub magnitudes: bool,
}

/// `make_qkx2_quants`: a scale and what to take off (zero or more), and the codes; the best of a range of scales, each with
/// the minimum that fits it best.
pub(super) fn affine<const N: usize>(
    how: &Affine,
    x: &[f32; N],
    weights: &[f32; N],
    codes: &mut [u8; N],
) -> (f32, f32) {
    let (least, max) = super::range(x);
    let (mut sum_w, mut sum_x) = (0.0_f32, 0.0_f32);
    for (&x, &w) in x.iter().zip(weights) {
        sum_w += w;
        sum_x += w * x;
    }
    let mut min = if least > 0.0 { 0.0 } else { least };
    *codes = [0; N];
    if max == min {
        return (0.0, -min);
    }
    let code = |iscale: f32, min: f32, x: f32| nearest(iscale * (x - min)).clamp(0, how.most) as u8;
    let error = |codes: &[u8; N], scale: f32, min: f32| {
        let mut sum = 0.0_f32;
        for ((&x, &w), &code) in x.iter().zip(weights).zip(codes) {
            let diff = scale * code as f32 + min - x;
            sum += w * if how.magnitudes {
                diff.abs()
            } else {
                diff * diff
            };
        }
        sum
    };
    let iscale = how.most as f32 / (max - min);
    let mut scale = 1.0 / iscale;
    *codes = x.map(|x| code(iscale, min, x));
    let mut best = error(codes, scale, min);
    for step in 0..=how.steps {
        // From the best minimum so far, not from the first one: so does ggml.
        let iscale = (how.first + how.step * step as f32 + how.most as f32) / (max - min);
        let tried = x.map(|x| code(iscale, min, x));
        let fitted = fit(x, weights, &tried, sum_w, sum_x);
        let Some((this_scale, this_min)) = fitted else {
            continue;
        };
        let this = error(&tried, this_scale, this_min);
        if this < best {
            (*codes, best, scale, min) = (tried, this, this_scale, this_min);
        }
    }
    (scale, -min)
}

/// The scale and minimum (not above zero) of the least weighted squares for these codes.
fn fit<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    codes: &[u8; N],
    sum_w: f32,
    sum_x: f32,
) -> Option<(f32, f32)> {
    let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0_f32, 0.0_f32, 0.0_f32);
    for ((&x, &w), &code) in x.iter().zip(weights).zip(codes) {
        let l = code as f32;
        sum_l += w * l;
        sum_l2 += w * l * l;
        sum_xl += w * l * x;
    }
    let d = sum_w * sum_l2 - sum_l * sum_l;
    if d <= 0.0 || d.is_nan() {
        return None;
    }
    let min = (sum_l2 * sum_x - sum_l * sum_xl) / d;
    if min > 0.0 {
        return Some((sum_xl / sum_l2, 0.0));
    }
    Some(((sum_w * sum_xl - sum_x * sum_l) / d, min))
}

//! The IQ types of super-blocks to `f32`: indices into grids ([`super::grids`]), signs, and small scales.

use super::grids::{self, even_signs, point4, point8};
use super::{IQ4_VALUES, f16_at, u16_at, u32_at};

const MAGNITUDES: [f32; 4] = [8.0, 25.0, 43.0, 0.0];
const DIGITS: [f32; 4] = [-1.0, 0.0, 1.0, 0.0];
const XXS: [f32; 8] = [4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0];
const ODD: [f32; 8] = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0];

/// What `IQ1_S` and `IQ1_M` add to or take from every digit.
const DELTA: f32 = 0.125;

/// `scale` times the magnitudes, negated where the sign's bit is set.
#[inline]
fn signed<const N: usize>(out: &mut [f32], scale: f32, magnitudes: [f32; N], signs: u8) {
    for (j, (out, magnitude)) in out.iter_mut().zip(magnitudes).enumerate() {
        let value = scale * magnitude;
        *out = if signs >> j & 1 == 1 { -value } else { value };
    }
}

/// d at 0; for each 32 elements 8 bytes at 2: four indices, then 4·7 bits of signs and a scale of 4 bits.
pub(super) fn iq2_xxs(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (ib, out) in out.chunks_exact_mut(32).enumerate() {
        let at = 2 + 8 * ib;
        let word = u32_at(block, at + 4);
        let d = d * (0.5 + (word >> 28) as f32) * 0.25;
        for (l, out) in out.chunks_exact_mut(8).enumerate() {
            let point = grids::IQ2_XXS[block[at + l] as usize];
            signed(
                out,
                d,
                point8(point, &MAGNITUDES),
                even_signs(word >> (7 * l)),
            );
        }
    }
}

/// d at 0; 32 words at 2 of a 9-bit index and 7 bits of signs; a scale of 4 bits for each 16 elements at 66.
pub(super) fn iq2_xs(block: &[u8; 74], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (l, out) in out.chunks_exact_mut(8).enumerate() {
        let word = u16_at(block, 2 + 2 * l) as usize;
        let scale = block[66 + l / 4] >> (4 * (l / 2 % 2)) & 15;
        let d = d * (0.5 + scale as f32) * 0.25;
        let point = grids::IQ2_XS[word & 511];
        signed(
            out,
            d,
            point8(point, &MAGNITUDES),
            even_signs(word as u32 >> 9),
        );
    }
}

/// d at 0; low 8 bits of 32 indices at 2; 32 bytes of signs at 34; two high bits of each index at 66; scales at 74.
pub(super) fn iq2_s(block: &[u8; 82], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (l, out) in out.chunks_exact_mut(8).enumerate() {
        let high = block[66 + l / 4] >> (2 * (l % 4)) & 3;
        let scale = block[74 + l / 4] >> (4 * (l / 2 % 2)) & 15;
        let d = d * (0.5 + scale as f32) * 0.25;
        let point = grids::IQ2_S[block[2 + l] as usize | (high as usize) << 8];
        signed(out, d, point8(point, &MAGNITUDES), block[34 + l]);
    }
}

/// d at 0; 64 indices at 2; for each 32 elements a word at 66 of 4·7 bits of signs and a scale of 4 bits.
pub(super) fn iq3_xxs(block: &[u8; 98], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (l, out) in out.chunks_exact_mut(4).enumerate() {
        let word = u32_at(block, 66 + 4 * (l / 8));
        let d = d * (0.5 + (word >> 28) as f32) * 0.5;
        let signs = even_signs(word >> (7 * (l / 2 % 4))) >> (4 * (l % 2));
        let point = grids::IQ3_XXS[block[2 + l] as usize];
        signed(out, d, point4(point, &XXS), signs);
    }
}

/// d at 0; low 8 bits of 64 indices at 2; their ninth bits at 66; signs at 74; a scale of 4 bits for each 32 at 106.
pub(super) fn iq3_s(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (l, out) in out.chunks_exact_mut(4).enumerate() {
        let scale = block[106 + l / 16] >> (4 * (l / 8 % 2)) & 15;
        let d = d * (1.0 + 2.0 * scale as f32);
        let high = block[66 + l / 8] >> (l % 8) & 1;
        let point = grids::IQ3_S[block[2 + l] as usize | (high as usize) << 8];
        signed(
            out,
            d,
            point4(point, &ODD),
            block[74 + l / 2] >> (4 * (l % 2)),
        );
    }
}

/// `scale` times the point's digits, each moved by `delta`.
#[inline]
fn moved(out: &mut [f32], scale: f32, index: usize, delta: f32) {
    let digits = point8(grids::IQ1[index & 2047], &DIGITS);
    for (out, digit) in out.iter_mut().zip(digits) {
        *out = scale * (digit + delta);
    }
}

/// d at 0; low 8 bits of 32 indices at 2; for each 32 elements a word at 34: 4·3 high bits, 3 bits of scale, delta's sign.
pub(super) fn iq1_s(block: &[u8; 50], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    for (l, out) in out.chunks_exact_mut(8).enumerate() {
        let word = u16_at(block, 34 + 2 * (l / 4)) as usize;
        let d = d * (2 * (word >> 12 & 7) + 1) as f32;
        let delta = if word >> 15 == 1 { -DELTA } else { DELTA };
        moved(
            out,
            d,
            block[2 + l] as usize | (word >> (3 * (l % 4)) & 7) << 8,
            delta,
        );
    }
}

/// Low 8 bits of 32 indices at 0; for each a nibble at 32 of 3 high bits and delta's sign; four words at 48, each of 4·3
/// bits of scale and, on top, four bits of the binary16 d.
pub(super) fn iq1_m(block: &[u8; 56], out: &mut [f32; 256]) {
    let words: [u16; 4] = std::array::from_fn(|i| u16_at(block, 48 + 2 * i));
    let bits = words[0] >> 12 | words[1] >> 8 & 0xF0 | words[2] >> 4 & 0xF00 | words[3] & 0xF000;
    let d = crate::numbers::f16_to_f32(bits);
    for (l, out) in out.chunks_exact_mut(8).enumerate() {
        let scale = words[l / 8] >> (3 * (l / 2 % 4)) & 7;
        let d = d * (2 * scale + 1) as f32;
        let nibble = block[32 + l / 2] as usize >> (4 * (l % 2)) & 15;
        let delta = if nibble & 8 == 8 { -DELTA } else { DELTA };
        moved(out, d, block[l] as usize | (nibble & 7) << 8, delta);
    }
}

/// d at 0; two high bits of eight scales at 2, their low nibbles at 4; nibbles at 8, in split halves for each 32:
/// `d (s - 32) values[q]`.
pub(super) fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = f16_at(block, 0);
    let high = u16_at(block, 2);
    for (ib, out) in out.chunks_exact_mut(32).enumerate() {
        let low = block[4 + ib / 2] >> (4 * (ib % 2)) & 15;
        let scale = low as i8 + ((high >> (2 * ib) & 3) << 4) as i8 - 32;
        let d = d * scale as f32;
        for j in 0..16 {
            let byte = block[8 + 16 * ib + j] as usize;
            out[j] = d * IQ4_VALUES[byte & 15] as f32;
            out[j + 16] = d * IQ4_VALUES[byte >> 4] as f32;
        }
    }
}

use super::*;

/// A format as its definition words it, in `f64`: what the tables and the rounding are held against.
struct Oracle {
    decode: fn(u8) -> f32,
    saturate: fn(f32) -> u8,
    special: fn(f32) -> u8,
    exponent: u32,
    mantissa: u32,
    bias: i32,
    /// The patterns, without the sign, from which on there is no finite number.
    end: u32,
}

fn oracles() -> Vec<(&'static str, Oracle)> {
    macro_rules! small {
        ($decode:ident, $encode:ident, $e:literal, $m:literal, $bias:literal) => {
            Oracle {
                decode: $decode,
                saturate: $encode,
                special: $encode,
                exponent: $e,
                mantissa: $m,
                bias: $bias,
                end: 1 << ($e + $m),
            }
        };
        ($decode:ident, $encode:ident, $e:literal, $m:literal, $bias:literal, $end:literal) => {
            Oracle {
                decode: $decode,
                saturate: |value| $encode(value, Overflow::Saturate),
                special: |value| $encode(value, Overflow::Special),
                exponent: $e,
                mantissa: $m,
                bias: $bias,
                end: $end,
            }
        };
    }
    vec![
        ("e2m1", small!(e2m1_to_f32, f32_to_e2m1, 2, 1, 1)),
        ("e2m3", small!(e2m3_to_f32, f32_to_e2m3, 2, 3, 1)),
        ("e3m2", small!(e3m2_to_f32, f32_to_e3m2, 3, 2, 3)),
        ("e4m3fn", small!(e4m3fn_to_f32, f32_to_e4m3fn, 4, 3, 7, 127)),
        ("e5m2", small!(e5m2_to_f32, f32_to_e5m2, 5, 2, 15, 124)),
        (
            "e4m3fnuz",
            small!(e4m3fnuz_to_f32, f32_to_e4m3fnuz, 4, 3, 8, 128),
        ),
        (
            "e5m2fnuz",
            small!(e5m2fnuz_to_f32, f32_to_e5m2fnuz, 5, 2, 16, 128),
        ),
    ]
}

impl Oracle {
    fn sign(&self) -> u32 {
        1 << (self.exponent + self.mantissa)
    }

    fn has_negative_zero(&self, name: &str) -> bool {
        assert!(self.sign() >= 8, "{name}");
        !name.ends_with("fnuz")
    }

    fn value(&self, magnitude: u32) -> f64 {
        let exponent = (magnitude >> self.mantissa) as i32;
        let fraction =
            (magnitude & ((1 << self.mantissa) - 1)) as f64 / (1 << self.mantissa) as f64;
        match exponent {
            0 => fraction * 2f64.powi(1 - self.bias),
            _ => (1.0 + fraction) * 2f64.powi(exponent - self.bias),
        }
    }

    /// The magnitude's nearest pattern by search, where `end` stands for "too large": the number that would follow
    /// the largest one takes part in the search.
    fn nearest(&self, magnitude: f64) -> u32 {
        let magnitude = magnitude.min(self.value(self.end));
        (0..=self.end)
            .min_by(|&a, &b| {
                let far = |code: u32| (self.value(code) - magnitude).abs();
                far(a).total_cmp(&far(b)).then((a & 1).cmp(&(b & 1)))
            })
            .unwrap()
    }
}

#[test]
fn every_pattern_has_the_value_of_its_definition() {
    for (name, oracle) in oracles() {
        for magnitude in 0..oracle.end {
            let value = oracle.value(magnitude);
            assert_eq!(
                (oracle.decode)(magnitude as u8) as f64,
                value,
                "{name} {magnitude:#x}"
            );
            let negative = (oracle.decode)((magnitude | oracle.sign()) as u8);
            if magnitude == 0 && !oracle.has_negative_zero(name) {
                assert!(negative.is_nan(), "{name}");
                continue;
            }
            assert_eq!(
                negative.to_bits(),
                (-value as f32).to_bits(),
                "{name} {magnitude:#x}"
            );
        }
        for magnitude in oracle.end..oracle.sign() {
            let value = (oracle.decode)(magnitude as u8);
            let infinite = name == "e5m2" && magnitude == oracle.end;
            assert!(if infinite {
                value == f32::INFINITY
            } else {
                value.is_nan()
            });
        }
    }
}

#[test]
fn every_pattern_comes_back() {
    for (name, oracle) in oracles() {
        for code in 0..2 * oracle.sign() {
            let value = (oracle.decode)(code as u8);
            if value.is_nan() {
                assert!(
                    (oracle.decode)((oracle.special)(value)).is_nan(),
                    "{name} {code:#x}"
                );
                assert!(
                    (oracle.decode)((oracle.saturate)(value)).is_nan(),
                    "{name} {code:#x}"
                );
            } else {
                assert_eq!((oracle.special)(value) as u32, code, "{name}");
            }
        }
    }
}

/// Everything up to and past each tie: since the rounding is monotone between two of these, this is all of `f32`.
#[test]
fn rounding_is_to_nearest_ties_to_even_at_every_tie() {
    for (name, oracle) in oracles() {
        let last = oracle.end - 1;
        for code in 0..=last {
            let (low, high) = (oracle.value(code), oracle.value(code + 1));
            let tie = ((low + high) / 2.0) as f32;
            assert_eq!(tie as f64, (low + high) / 2.0, "f32 holds the ties");
            for magnitude in [
                low as f32,
                tie.next_down(),
                tie,
                tie.next_up(),
                (high as f32).next_down(),
            ] {
                check(name, &oracle, magnitude);
            }
        }
        for magnitude in [
            oracle.value(oracle.end) as f32,
            1e9,
            f32::MAX,
            f32::INFINITY,
            1e-30,
            1e-45,
        ] {
            check(name, &oracle, magnitude);
        }
    }
}

/// Every pattern of sixteen high bits: exponents of all sizes.
#[test]
fn rounding_agrees_with_a_search_over_all_exponents() {
    for (name, oracle) in oracles() {
        for high in (0..0x7F80_u32).step_by(3) {
            check(name, &oracle, f32::from_bits(high << 16 | 0x8001));
        }
    }
}

fn check(name: &str, oracle: &Oracle, magnitude: f32) {
    let nearest = match magnitude.is_infinite() {
        true => oracle.end,
        false => oracle.nearest(magnitude as f64),
    };
    let saturated = nearest.min(oracle.end - 1);
    assert_eq!(
        (oracle.saturate)(magnitude) as u32,
        saturated,
        "{name} {magnitude:e}"
    );
    let negative = match (saturated, oracle.has_negative_zero(name)) {
        (0, false) => 0,
        _ => saturated | oracle.sign(),
    };
    assert_eq!(
        (oracle.saturate)(-magnitude) as u32,
        negative,
        "{name} -{magnitude:e}"
    );
    let special = (oracle.decode)((oracle.special)(magnitude));
    match (nearest == oracle.end, name) {
        (true, "e5m2") => assert_eq!(special, f32::INFINITY),
        (true, "e4m3fn" | "e4m3fnuz" | "e5m2fnuz") => {
            assert!(special.is_nan(), "{name} {magnitude:e}")
        }
        _ => assert_eq!((oracle.special)(magnitude) as u32, saturated),
    }
}

#[test]
fn nan_is_nan_or_negative_zero() {
    for (name, oracle) in oracles() {
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7F80_0001)] {
            for encode in [oracle.saturate, oracle.special] {
                let code = encode(nan);
                let value = (oracle.decode)(code);
                if oracle.sign() < 128 {
                    assert_eq!(code as u32, oracle.sign(), "{name}");
                } else {
                    assert!(value.is_nan(), "{name}");
                }
            }
        }
    }
}

#[test]
fn powers_of_two() {
    for code in 0..255_u8 {
        let value = e8m0_to_f32(code);
        assert_eq!(value as f64, 2f64.powi(code as i32 - 127));
        assert_eq!(f32_to_e8m0(value), code);
        // The tie with the next one goes up; what is just below it does not.
        let tie = (value as f64 * 1.5) as f32;
        assert_eq!(f32_to_e8m0(tie), code + 1);
        assert_eq!(f32_to_e8m0(tie.next_down()), code);
        assert_eq!(f32_to_e8m0(-value), 255);
    }
    assert!(e8m0_to_f32(255).is_nan());
    assert_eq!([0.0, -0.0, 1e-45].map(f32_to_e8m0), [0; 3]);
    let never = [
        f32::INFINITY,
        f32::NAN,
        -f32::NAN,
        f32::MAX,
        -1e-45,
        f32::NEG_INFINITY,
    ];
    assert_eq!(never.map(f32_to_e8m0), [255; 6]);
}

/// ggml's C function, line for line.
fn ggml_fp32_to_ue4m3(mut x: f32) -> u8 {
    if x.is_nan() || x <= 0.0 {
        return 0;
    }
    if x > 448.0 {
        x = 448.0;
    }
    let bits = x.to_bits();
    let mut exponent = (bits >> 23 & 0xFF) as i32 - 127 + 7;
    if exponent <= 0 {
        let man = ((x * 512.0 + 0.5) as i32).min(7);
        return if man < 1 { 0 } else { man as u8 };
    }
    if exponent >= 15 {
        return 0x7E;
    }
    let mut man = (bits >> 20 & 7) as i32 + (bits >> 19 & 1) as i32;
    if man > 7 {
        man = 0;
        exponent += 1;
        if exponent >= 15 {
            return 0x7E;
        }
    }
    (exponent << 3 | man) as u8
}

#[test]
fn unsigned_e4m3_is_ggmls() {
    for code in 0..=255_u8 {
        let expected = match code {
            0x7F => 0.0,
            0xFF => 480.0,
            _ => E4M3FN.decode(code as u32 & 0x7F),
        };
        assert_eq!(ue4m3_to_f32(code), expected);
    }
    for high in 0..=0xFFFF_u32 {
        for low in [0, 1, 0x7FFF, 0x8000, 0xFFFF] {
            let value = f32::from_bits(high << 16 | low);
            assert_eq!(f32_to_ue4m3(value), ggml_fp32_to_ue4m3(value), "{value:e}");
        }
    }
}

/// binary16 and bfloat16 by a search of their own: the crate that converts them is held against the definition.
#[test]
fn half_floats() {
    for bits in 0..=0xFFFF_u16 {
        let (f16_value, bf16_value) = (f16_to_f32(bits), bf16_to_f32(bits));
        let magnitude = bits & 0x7FFF;
        let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
        if magnitude < 0x7C00 {
            let fraction = (magnitude & 0x3FF) as f64 / 1024.0;
            let value = match magnitude >> 10 {
                0 => fraction * 2f64.powi(-14),
                exponent => (1.0 + fraction) * 2f64.powi(exponent as i32 - 15),
            };
            assert_eq!(f16_value as f64, sign * value);
            assert_eq!(f32_to_f16(f16_value), bits);
            // The tie with the next pattern goes to the even one, and from 65520 on to infinity.
            let next = f16_to_f32(0x7C00.min(magnitude + 1)).min(65536.0);
            let tie = (f16_to_f32(magnitude) + next) / 2.0;
            assert_eq!(f32_to_f16(tie), magnitude + (magnitude & 1));
            assert_eq!(f32_to_f16(tie.next_down()), magnitude);
            assert_eq!(f32_to_f16(tie.next_up()), magnitude + 1);
        }
        assert_eq!(f16_value.is_nan(), magnitude > 0x7C00);
        assert_eq!(bf16_value.is_nan(), magnitude > 0x7F80);
        if magnitude < 0x7F80 {
            assert_eq!(bf16_value.to_bits(), (bits as u32) << 16);
            assert_eq!(f32_to_bf16(bf16_value), bits);
            let tie = (magnitude as u32) << 16 | 0x8000;
            assert_eq!(
                f32_to_bf16(f32::from_bits(tie)),
                magnitude + (magnitude & 1)
            );
            assert_eq!(f32_to_bf16(f32::from_bits(tie - 1)), magnitude);
            assert_eq!(f32_to_bf16(f32::from_bits(tie + 1)), magnitude + 1);
        }
    }
    assert!(f16_to_f32(f32_to_f16(f32::NAN)).is_nan());
    assert!(bf16_to_f32(f32_to_bf16(f32::from_bits(0x7F80_0001))).is_nan());
}

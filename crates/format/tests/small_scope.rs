//! Everything small, without exception: every way to place up to three tensors among the offsets
//! 0 to 6, and every small shape of every dtype, against rules written byte by byte.

#![allow(
    clippy::disallowed_macros,
    reason = "a test may say what it counted; the crate prints nothing"
)]

use tonnage_format::{Dtype, Header, ReadOptions, Reason};

/// A header of `U8` tensors; `parse` with the data section's length.
fn judge(tensors: &[(&str, u64, u64, u64)], data_len: u64, buffer: &mut Vec<u8>) -> Option<Reason> {
    use std::io::Write;
    buffer.clear();
    buffer.extend_from_slice(&[0; 8]);
    buffer.push(b'{');
    for (i, (name, extent, begin, end)) in tensors.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        write!(
            buffer,
            "{comma}\"{name}\":{{\"dtype\":\"U8\",\"shape\":[{extent}],\"data_offsets\":[{begin},{end}]}}"
        )
        .unwrap();
    }
    buffer.push(b'}');
    let len = buffer.len() as u64;
    buffer[..8].copy_from_slice(&(len - 8).to_le_bytes());
    let parsed = Header::parse(&buffer[..], Some(len + data_len), &ReadOptions::strict());
    parsed.err().map(|error| error.reason())
}

/// Chapter 6 by counting: how many tensors own each byte.
fn allowed(tensors: &[(u64, u64)], data_len: u64) -> Vec<Reason> {
    let mut broken = Vec::new();
    if tensors.iter().any(|(begin, end)| end < begin) {
        broken.push(Reason::OffsetsReversed);
    }
    let mut owners = [0; 8];
    for &(begin, end) in tensors {
        for byte in begin..end {
            owners[byte as usize] += 1;
        }
    }
    if owners.iter().any(|&count| count > 1) {
        broken.push(Reason::Overlap);
    }
    // An empty tensor stands between two bytes of different tensors, or at an end.
    for &(at, _) in tensors.iter().filter(|(begin, end)| begin == end) {
        if tensors.iter().any(|&(begin, end)| begin < at && at < end) {
            broken.push(Reason::EmptyInside);
        }
    }
    let end = tensors
        .iter()
        .map(|&(begin, end)| begin.max(end))
        .max()
        .unwrap_or(0);
    if owners[..end as usize].contains(&0) {
        broken.push(Reason::Hole);
    }
    if broken.is_empty() && end > data_len {
        broken.push(Reason::DataTruncated);
    }
    if broken.is_empty() && end < data_len {
        broken.push(Reason::TrailingData);
    }
    broken
}

#[test]
fn every_placement_of_up_to_three_tensors() {
    let places: Vec<(u64, u64)> = (0..=6).flat_map(|a| (0..=6).map(move |b| (a, b))).collect();
    let names = ["a", "b", "c"];
    let mut buffer = Vec::new();
    let (mut judged, mut accepted) = (0_u64, 0_u64);
    let mut check = |tensors: &[(u64, u64)]| {
        let rows: Vec<_> = tensors
            .iter()
            .zip(names)
            .map(|(&(begin, end), name)| (name, end.saturating_sub(begin), begin, end))
            .collect();
        for data_len in 0..=7 {
            let found = judge(&rows, data_len, &mut buffer);
            let wanted = allowed(tensors, data_len);
            match found {
                None => assert!(wanted.is_empty(), "{tensors:?} in {data_len}: {wanted:?}"),
                Some(reason) => {
                    assert!(
                        wanted.contains(&reason),
                        "{tensors:?} in {data_len}: {reason:?}"
                    );
                }
            }
            judged += 1;
            accepted += found.is_none() as u64;
        }
    };
    check(&[]);
    for &a in &places {
        check(&[a]);
        for &b in &places {
            check(&[a, b]);
            places.iter().for_each(|&c| check(&[a, b, c]));
        }
    }
    assert_eq!(judged, 8 * (1 + 49 + 49 * 49 + 49 * 49 * 49));
    println!("{judged} placements, {accepted} accepted");
    assert_eq!(accepted, tilings());
}

/// The same number from the other side: cuts of 0..n, each in every order that differs.
fn tilings() -> u64 {
    let mut all = std::collections::BTreeSet::from([vec![]]);
    for n in 0..=6 {
        all.insert(vec![(0, n)]);
        for i in 0..=n {
            let [a, b] = [(0, i), (i, n)];
            all.extend([vec![a, b], vec![b, a]]);
            for j in i..=n {
                let [b, c] = [(i, j), (j, n)];
                let orders = [
                    [a, b, c],
                    [a, c, b],
                    [b, a, c],
                    [b, c, a],
                    [c, a, b],
                    [c, b, a],
                ];
                all.extend(orders.map(Vec::from));
            }
        }
    }
    all.len() as u64
}

#[test]
fn every_small_shape_of_every_dtype() {
    let mut shapes: Vec<Vec<u64>> = vec![vec![]];
    let mut from = 0;
    for _ in 0..3 {
        let upto = shapes.len();
        for at in from..upto {
            for extent in 0..=4 {
                let mut longer = shapes[at].clone();
                longer.push(extent);
                shapes.push(longer);
            }
        }
        from = upto;
    }
    assert_eq!(shapes.len(), 1 + 5 + 25 + 125);
    let (mut judged, mut accepted) = (0_u64, 0_u64);
    for &dtype in Dtype::ALL {
        for shape in &shapes {
            // Count the elements one at a time, and the bits of each.
            let elements = shape
                .iter()
                .fold(1, |count, &extent| (0..count).map(|_| extent).sum());
            let bits = (0..elements)
                .map(|_: u64| dtype.row().bits as u64)
                .sum::<u64>();
            for len in [
                bits / 8,
                bits / 8 + 1,
                (bits / 8).saturating_sub(1),
                8 * elements,
            ] {
                let found = one(dtype, shape, len);
                let wanted = match (bits % 8, bits / 8 == len) {
                    (0, true) => None,
                    (0, false) => Some(Reason::SizeMismatch),
                    _ => Some(Reason::PartialByte),
                };
                assert_eq!(found, wanted, "{dtype} {shape:?} in {len} bytes");
                judged += 1;
                accepted += found.is_none() as u64;
            }
        }
    }
    println!("{judged} tensors, {accepted} accepted");
    assert!(accepted > 3000 && judged - accepted > 3000);
}

fn one(dtype: Dtype, shape: &[u64], len: u64) -> Option<Reason> {
    let json = format!(
        "{{\"t\":{{\"dtype\":\"{}\",\"shape\":{shape:?},\"data_offsets\":[0,{len}]}}}}",
        dtype.name()
    );
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    let parsed = Header::parse(
        &file[..],
        Some(file.len() as u64 + len),
        &ReadOptions::strict(),
    );
    parsed.err().map(|error| error.reason())
}

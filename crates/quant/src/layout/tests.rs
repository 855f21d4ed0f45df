use super::*;

/// A generator of random numbers that needs nothing.
fn random(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

fn holds(layout: &Layout, bytes: usize) {
    let mut seed = 7;
    let mut memory = vec![0; bytes];
    let all: Vec<[u64; 2]> = (0..layout.shape[0])
        .flat_map(|i| (0..layout.shape[1]).map(move |j| [i, j]))
        .collect();
    let codes: Vec<u32> = all
        .iter()
        .map(|_| random(&mut seed) as u32 & low(layout.bits()))
        .collect();
    for (index, code) in all.iter().zip(&codes) {
        layout.put(&mut memory, index, *code);
    }
    let reader = layout.reader(&memory).unwrap();
    for (index, code) in all.iter().zip(&codes) {
        assert_eq!(reader.get(index), *code, "{index:?} of {layout:?}");
    }
    let columns = layout.shape[1] as usize;
    let mut by_rows = vec![0; bytes];
    let writer = layout.writer(bytes).unwrap();
    for (i, row) in codes.chunks(columns).enumerate() {
        writer.row(&mut by_rows, &[i as u64], row.iter().copied());
    }
    assert_eq!(by_rows, memory);
    assert!(layout.writer(bytes - 1).is_err());
    for (i, codes) in codes.chunks(columns).enumerate() {
        let mut row = vec![0; columns - 3];
        reader.row(&[i as u64], 3, &mut row);
        assert_eq!(row, codes[3..]);
    }
    assert!(layout.reader(&memory[..bytes - 1]).is_err());
}

#[test]
fn what_is_put_is_read() {
    // Rows of 20 codes of 3 bits, each row in whole words.
    holds(&Layout::dense(&[5, 20], 3, 32).unwrap(), 5 * 8);
    // Words along the first axis that lie a row apart, with codes that straddle them.
    let stream = Plane {
        stream: Some(Stream {
            axis: 0,
            step: 3,
            word: 32,
            stride: 7 * 32,
        }),
        ..Plane::new(3, vec![vec![], vec![digit(7, 32)]])
    };
    holds(&Layout::of(&[32, 7], stream), 3 * 7 * 4);
    // Two planes, the fields of a word from the highest down.
    let low = Plane {
        base: 28,
        ..Plane::new(4, vec![vec![digit(3, 64)], vec![digit(8, -4)]])
    };
    let high = Plane {
        shift: 4,
        base: 32,
        ..Plane::new(1, vec![vec![digit(3, 64)], vec![digit(8, 1)]])
    };
    holds(
        &Layout {
            shape: vec![3, 8],
            planes: vec![low, high],
        },
        3 * 8 - 3,
    );
}

#[test]
fn hostile_layouts_are_refused() {
    let good = Layout::dense(&[4, 4], 4, 1).unwrap();
    assert!(good.check(64).is_ok() && good.check(63).is_err());
    let with = |change: &dyn Fn(&mut Layout)| {
        let mut layout = good.clone();
        change(&mut layout);
        layout.check(64)
    };
    let refused: [&dyn Fn(&mut Layout); 9] = [
        &|l| l.shape = vec![],
        &|l| l.shape = vec![4, u64::MAX],
        &|l| l.planes.clear(),
        &|l| l.planes = vec![l.planes[0].clone(); 2],
        &|l| l.planes[0].bits = 0,
        &|l| l.planes[0].shift = u32::MAX,
        &|l| l.planes[0].base = u64::MAX,
        &|l| l.planes[0].axes[1] = vec![digit(4, -1)],
        &|l| l.planes[0].axes[0] = vec![digit(u64::MAX, i64::MAX), digit(u64::MAX, i64::MIN)],
    ];
    for (at, change) in refused.iter().enumerate() {
        assert!(with(*change).is_err(), "{at}");
    }
    assert!(Layout::dense(&[u64::MAX, u64::MAX], 4, 1).is_err());
}

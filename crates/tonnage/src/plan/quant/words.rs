//! Cuts as expressions of a plan, and in words.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use tonnage_plan::{Expr, Place, Placement};
use tonnage_quant::map::QTensor;
use tonnage_quant::scheme::Part;
use tonnage_quant::slice::{Cut, How, Step};

use super::Seat;

/// Steps as an expression over a part.
pub(super) fn expr(part: &Part, steps: &[Step]) -> Expr {
    let mut shape = part.shape.clone();
    let reshape = |of: Expr, shape: &[u64]| Expr::Reshape {
        of: Box::new(of),
        shape: shape.to_vec(),
    };
    steps
        .iter()
        .fold(Expr::source(&part.name), |of, step| match step {
            Step::Reshape(to) => {
                shape.clone_from(to);
                reshape(of, to)
            }
            &Step::Slice { dim, start, stop } => {
                if let Some(len) = shape.get_mut(dim) {
                    *len = stop.saturating_sub(start);
                }
                Expr::Slice {
                    of: Box::new(of),
                    dim: dim as i64,
                    start,
                    stop,
                    step: 1,
                }
            }
            &Step::Each { dim, times } => {
                // Each index becomes a dimension of its own, which is then repeated.
                let mut apart = shape.clone();
                apart.insert((dim + 1).min(apart.len()), 1);
                let of = Expr::Repeat {
                    of: Box::new(reshape(of, &apart)),
                    dim: dim as i64 + 1,
                    times,
                };
                if let Some(len) = shape.get_mut(dim) {
                    *len = len.saturating_mul(times);
                }
                reshape(of, &shape)
            }
        })
}

/// How a tensor was cut, in a few words.
pub(super) fn note(
    tensor: &QTensor,
    seat: &Seat,
    cut: &Cut,
    moved: &BTreeMap<usize, u64>,
) -> String {
    let mut text = tensor.preset();
    for (axis, &len) in tensor.shape.iter().enumerate() {
        let (start, size) = (
            seat.start.get(axis).copied().unwrap_or(0),
            seat.size.get(axis).copied().unwrap_or(0),
        );
        if size == len && cut.how(axis) == How::Clean {
            continue;
        }
        let _ = write!(text, ", axis {axis} {start}:{} of {len}: ", start + size);
        // Writing to a string never fails.
        let _ = match moved.get(&axis) {
            Some(multiple) => write!(text, "uneven, in multiples of {multiple}"),
            None => write!(text, "{}", cut.how(axis)),
        };
    }
    text
}

/// Owners by axis, in a few words.
pub(super) fn label(place: &Place) -> String {
    if place.is_empty() {
        return "all".to_owned();
    }
    let axes = place.iter().map(|(axis, one)| match one {
        Placement::Owner(coords) => {
            let coords: Vec<String> = coords.iter().map(u32::to_string).collect();
            format!("{axis}={}", coords.join("+"))
        }
        _ => axis.clone(),
    });
    axes.collect::<Vec<_>>().join(",")
}

//! Expressions: a view written down, as JSON.
//!
//! ```json
//! {"concat": {"of": [{"source": "q"}, {"slice": {"of": {"source": "kv"}, "dim": 0, "start": 0, "stop": 8}}], "dim": 0}}
//! ```

use serde::{Deserialize, Serialize};

use crate::error::{Error, Reason, Result};
use crate::limits;
use crate::view::View;

/// How a tensor is put together from named ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Expr {
    /// A tensor of the checkpoint, by name.
    Source(String),
    /// `start`, `start + step`, … below `stop` of a dimension.
    Slice {
        /// Of what.
        of: Box<Expr>,
        /// The dimension; it may count from the end, as in every operation.
        dim: i64,
        /// The first index.
        start: u64,
        /// One past the last index that may be taken.
        stop: u64,
        /// Distance between indices.
        #[serde(default = "one", skip_serializing_if = "is_one")]
        step: u64,
    },
    /// One behind the other along a dimension.
    Concat {
        /// Of what.
        of: Vec<Expr>,
        /// The dimension.
        dim: i64,
    },
    /// As the indices of a new dimension.
    Stack {
        /// Of what.
        of: Vec<Expr>,
        /// Where the new dimension stands.
        dim: i64,
    },
    /// Dimensions in another order.
    Permute {
        /// Of what.
        of: Box<Expr>,
        /// For each dimension of the result, the one that it was.
        dims: Vec<i64>,
    },
    /// The same elements, in row-major order, in another shape.
    Reshape {
        /// Of what.
        of: Box<Expr>,
        /// The new extents.
        shape: Vec<u64>,
    },
    /// Indices in turn: `i · n + j` is index `i` of operand `j` of `n`.
    Interleave {
        /// Of what.
        of: Vec<Expr>,
        /// The dimension.
        dim: i64,
    },
    /// A whole dimension several times, one copy behind the other, as `torch.Tensor.repeat` does.
    Repeat {
        /// Of what.
        of: Box<Expr>,
        /// The dimension.
        dim: i64,
        /// How often.
        times: u64,
    },
    /// Zeros before and after.
    Pad {
        /// Of what.
        of: Box<Expr>,
        /// The dimension.
        dim: i64,
        /// Indices of zeros before.
        #[serde(default)]
        before: u64,
        /// Indices of zeros after.
        #[serde(default)]
        after: u64,
    },
}

fn one() -> u64 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_one(step: &u64) -> bool {
    *step == 1
}

impl Expr {
    /// A tensor of the checkpoint.
    pub fn source(name: &str) -> Expr {
        Expr::Source(name.to_owned())
    }

    /// The view that it means; `find` gives the view of a name.
    ///
    /// # Errors
    /// Those of `find` and of the operations, and [`Reason::Limit`] for an expression too deep.
    pub fn view(&self, find: &dyn Fn(&str) -> Result<View>) -> Result<View> {
        self.at_depth(find, 0)
    }

    fn at_depth(&self, find: &dyn Fn(&str) -> Result<View>, depth: usize) -> Result<View> {
        if depth >= limits::DEPTH {
            return Err(Error::new(Reason::Limit)
                .found("an expression nested deeper")
                .needed(format_args!("at most {} levels", limits::DEPTH)));
        }
        let one = |expr: &Expr| expr.at_depth(find, depth + 1);
        let all = |of: &[Expr]| of.iter().map(one).collect::<Result<Vec<View>>>();
        match self {
            Expr::Source(name) => find(name),
            Expr::Slice {
                of,
                dim,
                start,
                stop,
                step,
            } => one(of)?.slice(*dim, *start, *stop, *step),
            Expr::Concat { of, dim } => View::concat(&all(of)?, *dim),
            Expr::Stack { of, dim } => View::stack(&all(of)?, *dim),
            Expr::Permute { of, dims } => one(of)?.permute(dims),
            Expr::Reshape { of, shape } => one(of)?.reshape(shape),
            Expr::Interleave { of, dim } => View::interleave(&all(of)?, *dim),
            Expr::Repeat { of, dim, times } => one(of)?.repeat(*dim, *times),
            Expr::Pad {
                of,
                dim,
                before,
                after,
            } => one(of)?.pad(*dim, *before, *after),
        }
    }

    /// Its operands.
    pub fn operands(&self) -> &[Expr] {
        match self {
            Expr::Source(_) => &[],
            Expr::Slice { of, .. }
            | Expr::Permute { of, .. }
            | Expr::Reshape { of, .. }
            | Expr::Repeat { of, .. }
            | Expr::Pad { of, .. } => std::slice::from_ref(of),
            Expr::Concat { of, .. } | Expr::Stack { of, .. } | Expr::Interleave { of, .. } => of,
        }
    }

    fn operands_mut(&mut self) -> &mut [Expr] {
        match self {
            Expr::Source(_) => &mut [],
            Expr::Slice { of, .. }
            | Expr::Permute { of, .. }
            | Expr::Reshape { of, .. }
            | Expr::Repeat { of, .. }
            | Expr::Pad { of, .. } => std::slice::from_mut(of),
            Expr::Concat { of, .. } | Expr::Stack { of, .. } | Expr::Interleave { of, .. } => of,
        }
    }

    /// Calls `each` with the name of every source in it, in order.
    pub fn sources<'a>(&'a self, each: &mut dyn FnMut(&'a str)) {
        if let Expr::Source(name) = self {
            each(name);
        }
        self.operands().iter().for_each(|of| of.sources(each));
    }

    /// Puts what `of` gives for a name in the place of that source: expressions over expressions
    /// become one. A name for which it gives nothing stays a source.
    pub fn substitute(&mut self, of: &dyn Fn(&str) -> Option<Expr>) {
        if let Expr::Source(name) = self {
            if let Some(expr) = of(name) {
                *self = expr;
            }
            return;
        }
        for operand in self.operands_mut() {
            operand.substitute(of);
        }
    }
}

//! The command line: verbs, options, examples.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Look at model-weight files, check, compare and edit them.
///
/// PATH is a .safetensors or .gguf file, a folder with a checkpoint in it, or an index (*.index.json).
/// Sizes are in binary units: 1 MiB = 1,048,576 bytes.
#[derive(Debug, Parser)]
#[command(
    name = "tonnage",
    version,
    arg_required_else_help = true,
    infer_long_args = true,
    after_help = "Exit codes: 0 done, equal, nothing found · 1 findings, differences, nothing there · 2 usage ·
3 malformed file · 4 limit exceeded · 5 unsupported · 6 input or output · 130 interrupted

`tonnage VERB --help` shows examples."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// Options of every verb.
    #[command(flatten)]
    pub common: Common,
}

/// Options of every verb.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Print JSON, errors too
    #[arg(long, global = true)]
    pub json: bool,
    /// Read as the reference implementation does, which accepts some files that the specification refuses
    #[arg(long, global = true)]
    pub compat: bool,
    /// Refuse all that the specification refuses, null metadata too, which some writers make
    #[arg(long, global = true, conflicts_with = "compat")]
    pub strict: bool,
    /// Follow symbolic links that lead out of a checkpoint's folder
    #[arg(long, global = true)]
    pub follow_links: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show what is in a checkpoint: tensors by module, sizes, dtypes, metadata
    Inspect(Inspect),
    /// Check files against the specification, and name every finding
    Verify(Verify),
    /// Compare two checkpoints: structure, dtypes, shapes, values
    Diff(Diff),
    /// Get, set or delete metadata; tensor data stays where it is if there is room
    Metadata(Metadata),
    /// Rename tensors
    Rename(Rename),
    /// Write a copy with floats cast to another dtype
    Cast(Cast),
    /// Write a copy in another container: GGUF to safetensors and back, block for block; or with other types
    Convert(Convert),
    /// Write a copy with weights quantised by rounding to nearest
    Quantize(Quantize),
    /// Write a copy as several files with an index
    Shard(Shard),
    /// Write a copy as one file
    Merge(Merge),
    /// Print, check or add checksums of tensor data
    Checksum(Checksum),
    /// Show which rank of a mesh reads which bytes, and prove that the plan holds; nothing is loaded
    Plan(Plan),
    /// Write what every rank of a mesh has, from a checkpoint or from what other ranks wrote
    Reshard(Reshard),
    /// Show the devices that checkpoints can be loaded to, and what to do where there is none
    Devices(Devices),
    /// Measure this machine, and loading a checkpoint on it, beside the reference package
    Bench(Bench),
    /// Print a completion script for a shell
    #[command(after_help = "Examples:
  tonnage completions bash > ~/.local/share/bash-completion/completions/tonnage
  tonnage completions zsh > \"${fpath[1]}/_tonnage\"
  tonnage completions fish > ~/.config/fish/completions/tonnage.fish")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage inspect model.safetensors
  tonnage inspect Qwen3-8B/ --select 'model.layers.0.*' --flat
  tonnage inspect model.safetensors --stats
  tonnage inspect model.safetensors --json | jq '.tensors[] | select(.bytes > 1e8) | .name'")]
pub struct Inspect {
    /// File, folder or index
    pub path: PathBuf,
    /// One row a tensor, with its whole name
    #[arg(long)]
    pub flat: bool,
    /// Show every layer, also where layers are alike
    #[arg(long)]
    pub full: bool,
    /// Read the values: minimum, maximum, mean, standard deviation, NaN, infinities, zeros
    #[arg(long)]
    pub stats: bool,
    /// Only tensors that match this glob (`* ? [abc]`); may be repeated
    #[arg(long, short, value_name = "GLOB")]
    pub select: Vec<String>,
}

/// `verify`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage verify model.safetensors
  tonnage verify Qwen3-8B/ other/*.safetensors --quiet
  tonnage verify model.safetensors --warnings-fail --json

Codes and clauses are those of the specification, spec/. Warnings and notes are about files that are valid
but had better be otherwise; they do not change the exit code unless --warnings-fail is given.")]
pub struct Verify {
    /// Files, folders or indexes
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
    /// Print findings only
    #[arg(long, short)]
    pub quiet: bool,
    /// Exit with 1 also for warnings
    #[arg(long)]
    pub warnings_fail: bool,
    /// Look at headers only; without it, data is compared with the checksums that a file has
    #[arg(long)]
    pub headers_only: bool,
}

/// `checksum`.
#[derive(Debug, Args)]
#[command(subcommand_required = true)]
pub struct Checksum {
    /// What to do.
    #[command(subcommand)]
    pub action: ChecksumAction,
}

/// What `checksum` can do.
#[derive(Debug, Subcommand)]
pub enum ChecksumAction {
    /// Print the checksum of each chunk, as the files have them
    #[command(after_help = "Examples:
  tonnage checksum print model.safetensors
  tonnage checksum print sharded/ --json

A row a chunk: file, first byte, bytes, CRC-64/NVME. Exit code 1: a file has no checksums.")]
    Print {
        /// File, folder or index
        path: PathBuf,
    },
    /// Compare tensor data with the checksums, and name every chunk that is wrong
    #[command(after_help = "Examples:
  tonnage checksum check model.safetensors
  tonnage checksum check sharded/ --json

Exit code 1: a chunk is wrong, or a file has no checksums.")]
    Check {
        /// File, folder or index
        path: PathBuf,
    },
    /// Add checksums to a file that has none, or renew them
    #[command(after_help = "Examples:
  tonnage checksum add model.safetensors
  tonnage checksum add model.safetensors --sidecar

Tensor data is read once and not changed; the header is edited as by `metadata set`. A file that has
checksums already is checked first, and refused if it is damaged. --sidecar also writes the BLAKE3 hash
of the file beside it, as NAME.b3, which `b3sum -c` reads.")]
    Add {
        /// The file
        file: PathBuf,
        /// Also write the BLAKE3 hash of the file beside it
        #[arg(long)]
        sidecar: bool,
        /// How to write.
        #[command(flatten)]
        editing: Editing,
    },
}

/// `diff`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage diff before.safetensors after/
  tonnage diff f32.safetensors bf16.safetensors --tolerance 0.01 --ignore-dtype
  tonnage diff a b --no-values --json

Exit code 0: equal; 1: different. Values are compared as numbers: NaN equals NaN, -0 equals 0.")]
pub struct Diff {
    /// The one
    pub a: PathBuf,
    /// The other
    pub b: PathBuf,
    /// Compare names, dtypes and shapes only; no tensor data is read
    #[arg(long)]
    pub no_values: bool,
    /// Values that are no further apart count as equal
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub tolerance: f64,
    /// Another dtype alone is no difference
    #[arg(long)]
    pub ignore_dtype: bool,
    /// Metadata that differ make the checkpoints different (they are always shown)
    #[arg(long)]
    pub metadata: bool,
    /// Only tensors that match this glob (`* ? [abc]`); may be repeated
    #[arg(long, short, value_name = "GLOB")]
    pub select: Vec<String>,
}

/// `metadata`.
#[derive(Debug, Args)]
#[command(subcommand_required = true)]
pub struct Metadata {
    /// What to do.
    #[command(subcommand)]
    pub action: MetadataAction,
}

/// What `metadata` can do.
#[derive(Debug, Subcommand)]
pub enum MetadataAction {
    /// Print one value, or all keys and values
    #[command(after_help = "Examples:
  tonnage metadata get model.safetensors
  tonnage metadata get model.safetensors format

One value is printed as it is if it is safe for a terminal, else quoted. Exit code 1: no such key.")]
    Get {
        /// File, folder or index
        path: PathBuf,
        /// The key; all if it is left out
        key: Option<String>,
    },
    /// Set values
    #[command(after_help = EDITING)]
    Set {
        /// The file
        file: PathBuf,
        /// KEY=VALUE; the value may hold further `=`
        #[arg(required = true, value_name = "KEY=VALUE")]
        pairs: Vec<String>,
        /// How to write.
        #[command(flatten)]
        editing: Editing,
    },
    /// Delete keys
    #[command(after_help = EDITING)]
    Delete {
        /// The file
        file: PathBuf,
        /// The keys
        #[arg(required = true)]
        keys: Vec<String>,
        /// How to write.
        #[command(flatten)]
        editing: Editing,
    },
}

const EDITING: &str = "Examples:
  tonnage metadata set model.safetensors format=pt license=apache-2.0
  tonnage metadata set model.safetensors note='reviewed' --in-place
  tonnage metadata delete model.safetensors note

How the file is changed: if the new header fits into the room of the old one and differs from it within one
512-byte sector, those bytes are overwritten, which a crash cannot tear. Otherwise the file is replaced whole
by a copy with the new header (on file systems that share blocks, such as XFS and Btrfs, the copy costs no
data). --in-place overwrites the header also where it spans several sectors and moves no data at all; until
it is complete, a copy of the old header lies beside the file. The report says which way was taken.

Checksums of the data stay as they are; data that is copied is compared with them. A BLAKE3 hash beside the
file is compared and renewed.";

/// How headers are edited.
#[derive(Clone, Debug, Args)]
pub struct Editing {
    /// Overwrite the header where it stands, if it fits; fail if it does not
    #[arg(long)]
    pub in_place: bool,
    /// Room to leave in the header for later edits, if the file is replaced (such as 4KiB)
    #[arg(long, value_name = "SIZE")]
    pub reserve: Option<String>,
    /// Remove the hash beside the file rather than renew it, which reads all of the file
    #[arg(long)]
    pub drop_sidecar: bool,
}

/// `rename`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage rename model.safetensors lm_head.weight output.weight
  tonnage rename model.safetensors 'model.layers.*.attn.*' 'blocks.*.attention.*'
  tonnage rename model.safetensors --regex '^module\\.(.+)' '$1' --dry-run
  tonnage rename sharded/ 'model.*' '*' --output renamed/

Each * of NEW stands for what the * at the same place of OLD matched. A file is edited as by `metadata set`:
only its header changes. A checkpoint of several files needs --output.")]
pub struct Rename {
    /// File, folder or index
    pub path: PathBuf,
    /// A name, a glob, or with --regex an expression
    pub old: String,
    /// The new name
    pub new: String,
    /// OLD is a regular expression, replaced wherever it is found; NEW may use $1, ${name}
    #[arg(long)]
    pub regex: bool,
    /// Show what would be renamed and change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Write a copy here instead of changing the file
    #[arg(long, short, value_name = "PATH")]
    pub output: Option<PathBuf>,
    /// Replace what is at --output
    #[arg(long, requires = "output")]
    pub force: bool,
    /// What becomes of the checksums of a copy.
    #[command(flatten)]
    pub sums: Sums,
    /// How to write.
    #[command(flatten)]
    pub editing: Editing,
}

/// Where a copy goes.
#[derive(Clone, Debug, Args)]
pub struct Target {
    /// What to read: file, folder or index
    pub input: PathBuf,
    /// What to write: a name in .safetensors is one file, anything else a folder
    pub output: PathBuf,
    /// Replace what is at OUTPUT
    #[arg(long)]
    pub force: bool,
    /// Do not wait until the data has reached the disk
    #[arg(long)]
    pub no_sync: bool,
    /// What becomes of checksums.
    #[command(flatten)]
    pub sums: Sums,
}

/// What becomes of checksums. By default a copy has those that its source had, which are compared on the way.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Sums {
    /// Give the copy checksums, also where what is read has none
    #[arg(long)]
    pub checksums: bool,
    /// Leave checksums out, and do not compare what is read with those that it has
    #[arg(long, conflicts_with = "checksums")]
    pub no_checksums: bool,
}

/// `cast`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage cast model.safetensors half.safetensors --to BF16
  tonnage cast model/ half/ --to float16 --select '*.weight' --max-size 2GB

Only floats are cast, to the nearest value, ties to even; other dtypes are copied. Sub-byte floats and F8_E8M0
belong to block formats and are copied too.")]
pub struct Cast {
    /// Where.
    #[command(flatten)]
    pub target: Target,
    /// The dtype, such as BF16, F16, F32, F8_E4M3, or its name in torch
    #[arg(long, value_name = "DTYPE")]
    pub to: String,
    /// Only cast tensors that match this glob (`*`, `?`, `[abc]`); the others are copied; may be repeated
    #[arg(long, short, value_name = "GLOB")]
    pub select: Vec<String>,
    /// Start another file before this size is exceeded (5GB, 500MiB); without it, one file
    #[arg(long, value_name = "SIZE")]
    pub max_size: Option<String>,
}

/// `convert`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage convert model.gguf model.safetensors
  tonnage convert model.safetensors again.gguf
  tonnage convert model-00001-of-00003.gguf model.gguf
  tonnage convert Qwen3-8B/ qwen3.gguf --type q4_k --type '*.down_proj.weight=q6_k'
  tonnage convert awq/ ct/ --to ct-pack --from '{\"*_proj.weight\": {\"preset\": \"awq-gemm\", \"params\": {\"group\": 128}}}'

A GGUF file that became safetensors comes back byte for byte: its header travels with it. Blocks of quantised
tensors stay as they are. With --type, plain safetensors become GGUF: names, rows and metadata as llama.cpp has
them, from the config.json and tokenizer.json beside them. See docs/gguf.md. With --to, quantised tensors go
over to another scheme with their codes, scales and zero points; what would be lost is refused.
See docs/quantized.md.")]
pub struct Convert {
    /// Where. An OUTPUT in .gguf is a GGUF file.
    #[command(flatten)]
    pub target: Target,
    /// Start another file before this size is exceeded; for safetensors
    #[arg(long, value_name = "SIZE")]
    pub max_size: Option<String>,
    /// Plain tensors to GGUF: the type of matrices (q4_k, q8_0, f16), or GLOB=TYPE for some of them; may be repeated
    #[arg(long = "type", value_name = "[GLOB=]TYPE")]
    pub types: Vec<String>,
    /// GGUF metadata on top of what the configuration says: text, or a number, true, false; may be repeated
    #[arg(long, value_name = "KEY=VALUE", requires = "types")]
    pub kv: Vec<String>,
    /// Keep tensors' names and rows as they are, for architectures that are not known
    #[arg(long, requires = "types")]
    pub keep_names: bool,
    /// Quantised tensors to another scheme, such as ct-pack, awq, mlx:scale=F16
    #[arg(long, value_name = "SCHEME", conflicts_with = "types")]
    pub to: Option<String>,
    /// What the tensors are, where the files don't say it: patterns with presets and parameters, as JSON
    #[arg(long, value_name = "JSON", requires = "to")]
    pub from: Option<String>,
    /// Let values change where the other scheme can't have them, and say how many did
    #[arg(long, requires = "to")]
    pub lossy: bool,
}

/// `quantize`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage quantize Qwen3-8B/ Qwen3-8B-awq/ --scheme awq
  tonnage quantize model/ out/ --scheme gptq:bits=4,group=64 --select '*.mlp.*.weight'
  tonnage quantize model/ out/ --scheme fp8-block --max-size 5GB
  tonnage quantize model/ model.gguf --scheme q4_k

Every value becomes its nearest code: nothing is calibrated or searched. Without --select, matrices called
*.weight are quantised, but not embeddings, lm_head, norms and routers. A folder gets a config.json with what
libraries read, if INPUT has one. See docs/quantized.md for schemes and their options.")]
pub struct Quantize {
    /// Where. An OUTPUT in .gguf is a GGUF file, and SCHEME a type of ggml.
    #[command(flatten)]
    pub target: Target,
    /// The scheme, with options behind a colon: bits, group, symmetric, block=ROWSxCOLUMNS, scale=DTYPE
    #[arg(long, value_name = "SCHEME")]
    pub scheme: String,
    /// Only tensors that match this glob (`*`, `?`, `[abc]`); may be repeated
    #[arg(long, short, value_name = "GLOB")]
    pub select: Vec<String>,
    /// Start another file before this size is exceeded; for safetensors
    #[arg(long, value_name = "SIZE")]
    pub max_size: Option<String>,
}

/// `shard`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage shard model.safetensors sharded/
  tonnage shard model/ smaller/ --max-size 500MB

KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024, as on the Hugging Face Hub.")]
pub struct Shard {
    /// Where.
    #[command(flatten)]
    pub target: Target,
    /// Start another file before this size is exceeded
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub max_size: String,
}

/// `merge`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage merge sharded/ model.safetensors
  tonnage merge sharded/model.safetensors.index.json model.safetensors --force")]
pub struct Merge {
    /// Where.
    #[command(flatten)]
    pub target: Target,
}

/// A mesh, and who has what on it.
#[derive(Debug, Args)]
pub struct Placed {
    /// Axes with their sizes, outermost first, such as pp=2,tp=4; rank = row-major position
    #[arg(long, value_name = "AXIS=N,…")]
    pub mesh: String,
    /// `auto` (by the usual names), a file with rules as JSON, or PATTERN=PLACEMENT; may be repeated, the first pattern that matches holds
    #[arg(long, value_name = "RULES", default_value = "auto")]
    pub rules: Vec<String>,
}

/// `plan`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage plan Qwen3-8B/ --mesh tp=4
  tonnage plan Qwen3-8B/ --mesh pp=2,tp=4 --rules rules.json --rank 3
  tonnage plan m.safetensors --mesh tp=2 --rules '*.o_proj.weight=shard:1' --rules '*=replicate' --html plan.html

Placements: replicate · shard:DIM · strided:DIM:GROUPS · owner:COORDINATE, of the axis tp (pp for an owner) or the
only one. A file of rules is {PATTERN: PLACEMENT} or {PATTERN: {AXIS: PLACEMENT}}, where placements may be all that
the library knows. With --json: the plan, which the library reads back and verifies.")]
pub struct Plan {
    /// File, folder or index
    pub path: PathBuf,
    /// The mesh and the rules.
    #[command(flatten)]
    pub placed: Placed,
    /// Show what this rank reads, tensor by tensor
    #[arg(long)]
    pub rank: Option<u32>,
    /// Write a picture of who reads what
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// `reshard`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage reshard Qwen3-8B/ tp4/ --mesh tp=4
  tonnage reshard tp4/ tp8/ --mesh tp=8
  tonnage reshard tp8/ whole/ --mesh tp=1 --max-shard-size 5GB

OUTPUT gets a file a rank, rank-00000.safetensors and so on, whose metadata says which part of which tensor each of
its tensors is; `reshard` reads such folders too. A mesh of one rank gives an ordinary checkpoint. Rules: as of
`tonnage plan`.")]
pub struct Reshard {
    /// Where.
    #[command(flatten)]
    pub target: Target,
    /// The mesh and the rules.
    #[command(flatten)]
    pub placed: Placed,
    /// Start another file before this size is exceeded
    #[arg(long, value_name = "SIZE")]
    pub max_shard_size: Option<String>,
}

/// `devices`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage devices
  tonnage devices cuda:0
  tonnage devices --json | jq -r '.devices[].id'

Every kind is looked for: cpu, cuda, rocm, vulkan, metal. Each device is opened for a moment, to ask what is
free. TONNAGE_CUDA_DRIVER, TONNAGE_HIP_DRIVER and TONNAGE_VULKAN_LOADER name other libraries to open.
Exit code 1: the device that was named is not there.")]
pub struct Devices {
    /// Only this device
    pub device: Option<String>,
    /// Start NVIDIA's cuFile and end: what this program runs itself as, since that start may never return
    #[arg(long, hide = true)]
    pub try_cufile: bool,
}

/// `bench`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tonnage bench Qwen3-8B/
  tonnage bench model.safetensors --html report.html
  tonnage bench model/ --bytes 8GiB --rounds 5 --seconds 300 --json
  tonnage bench model.safetensors --python .venv/bin/python --device cuda:0

Cold loads are preceded by dropping the checkpoint's own pages from the page cache; nothing else is touched,
and nothing is written but the report. GB/s are 10^9 bytes a second, medians of the rounds.")]
pub struct Bench {
    /// File, folder or index
    pub path: PathBuf,
    /// Measurements of each kind
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub rounds: usize,
    /// Load tensors up to this size, in the order of the files
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    pub bytes: String,
    /// Begin no further round after this time
    #[arg(long, value_name = "N", default_value_t = 45)]
    pub seconds: u64,
    /// Only tensors that match this glob (`* ? [abc]`); may be repeated
    #[arg(long, short, value_name = "GLOB")]
    pub select: Vec<String>,
    /// A Python with the reference package `safetensors`; else that of VIRTUAL_ENV, or python3
    #[arg(long, value_name = "PATH", conflicts_with = "no_reference")]
    pub python: Option<PathBuf>,
    /// Load to this device (cpu, cuda:0, vulkan:0 …); may be repeated. Default: cpu and all that are found
    #[arg(long, short, value_name = "DEVICE")]
    pub device: Vec<String>,
    /// Do not look for the reference package
    #[arg(long)]
    pub no_reference: bool,
    /// Write the report as one HTML file with charts
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

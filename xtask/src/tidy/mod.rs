//! What the house holds itself to, beside what compilers and lints see.

mod arrows;
mod sources;

use anyhow::{Result, bail};

/// Checks everything and reports every problem at once.
pub fn run() -> Result<()> {
    let mut problems = arrows::check()?;
    problems.extend(sources::check()?);
    if problems.is_empty() {
        return Ok(());
    }
    bail!("not tidy:\n  {}", problems.join("\n  "))
}

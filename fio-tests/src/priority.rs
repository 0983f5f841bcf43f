//! Measuring on a machine that others use: everything of ours goes first.

use std::path::Path;

use anyhow::{Context, Result};

const AUTOGROUP: &str = "/proc/self/autogroup";

/// Highest priority for this process and all that it starts; ends when dropped.
///
/// Where the kernel groups processes by session (autogroup), a nice value counts only within the session, so the
/// session is raised too, and lowered again at the end.
#[derive(Debug)]
pub struct Priority {
    session_before: Option<String>,
}

impl Priority {
    /// Raises it. Needs root.
    pub fn raise() -> Result<Priority> {
        rustix::process::setpriority_process(None, -20)
            .context("cannot raise the priority: are you root?")?;
        if !Path::new(AUTOGROUP).exists() {
            return Ok(Priority { session_before: None });
        }
        let text = std::fs::read_to_string(AUTOGROUP).context(AUTOGROUP)?;
        let before = text.rsplit(' ').next().unwrap_or("0").trim().to_owned();
        std::fs::write(AUTOGROUP, "-20").context(AUTOGROUP)?;
        Ok(Priority {
            session_before: Some(before),
        })
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(nice) = &self.session_before {
            let _ = std::fs::write(AUTOGROUP, nice); // our session's, and it works without, only rudely
        }
    }
}

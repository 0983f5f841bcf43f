//! Failures as the user sees them: one line with the way out, and an exit code.

use std::fmt;

use control::{ApiError, ErrorKind};

/// `weft --help` documents these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It was tried and failed.
    Failed = 1,
    /// The request is wrong in itself.
    Usage = 2,
    /// The daemon cannot be reached.
    Unreachable = 3,
    /// What was named does not exist.
    NotFound = 4,
    /// The present state forbids it, or it needs `--force` or `--yes`.
    Refused = 5,
}

/// Why a command was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The process's exit code.
    pub exit: Exit,
    /// What is wrong.
    pub message: String,
    /// The way out, may be empty.
    pub hint: String,
}

/// What a command returns.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// With [`Exit::Failed`].
    pub fn failed(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure {
            exit: Exit::Failed,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// With [`Exit::Usage`].
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure {
            exit: Exit::Usage,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// With [`Exit::Unreachable`].
    pub fn unreachable(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure {
            exit: Exit::Unreachable,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// With [`Exit::NotFound`].
    pub fn not_found(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure {
            exit: Exit::NotFound,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// With [`Exit::Refused`].
    pub fn refused(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure {
            exit: Exit::Refused,
            message: message.into(),
            hint: hint.into(),
        }
    }
}

/// Longest text of a failure: what the user typed may be in it, and may be a file's content.
const TEXT_SHOWN_MAX: usize = 600;

/// On one line and without what would move a terminal's cursor, whatever the text holds: scripts read stderr by
/// lines, and a name may come from elsewhere.
fn flat(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let joined = words.join(" ");
    let mut characters = joined.chars().filter(|c| !c.is_control());
    let mut flat: String = characters.by_ref().take(TEXT_SHOWN_MAX).collect();
    if characters.next().is_some() {
        flat.push_str("...");
    }
    flat
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&flat(&self.message))?;
        if !self.hint.is_empty() {
            write!(f, "; {}", flat(&self.hint))?;
        }
        Ok(())
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Failure {
        let exit = match error.kind {
            ErrorKind::Invalid => Exit::Usage,
            ErrorKind::NotFound => Exit::NotFound,
            ErrorKind::Conflict | ErrorKind::NeedsForce => Exit::Refused,
            ErrorKind::Unavailable | ErrorKind::Internal => Exit::Failed,
        };
        Failure {
            exit,
            message: error.message,
            hint: error.hint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line() {
        let failure = Failure::failed("two\nlines", "do\tthis");
        assert_eq!(failure.to_string(), "two lines; do this");
        assert_eq!(Failure::failed("alone", "").to_string(), "alone");
        assert_eq!(Failure::failed("a\u{1b}[2Jb", "").to_string(), "a[2Jb");
        let long = Failure::failed("x".repeat(1 << 20), "").to_string();
        assert!(long.len() < 1_000 && long.ends_with("..."));
    }

    #[test]
    fn each_kind_has_its_exit_code() {
        for (error, exit) in [
            (ApiError::invalid("", ""), 2),
            (ApiError::not_found("", ""), 4),
            (ApiError::conflict("", ""), 5),
            (ApiError::needs_force("", ""), 5),
            (ApiError::unavailable("", ""), 1),
            (ApiError::internal("", ""), 1),
        ] {
            assert_eq!(Failure::from(error.clone()).exit as u8, exit, "{error:?}");
        }
    }
}

//! What a request that was not done is answered with: a kind, one sentence, and the way out.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The kinds of refusal; each has one HTTP status and one exit code of `weft`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request itself is wrong; repeating it cannot help. 400.
    Invalid,
    /// What it names does not exist. 404.
    NotFound,
    /// The present state forbids it. 409.
    Conflict,
    /// Something would be destroyed: allowed only with `force`. 409.
    NeedsForce,
    /// It cannot be done now but may be later: too few disks, a disk that is missing. 503.
    Unavailable,
    /// Our fault or the machine's. 500.
    Internal,
}

impl ErrorKind {
    /// The HTTP status.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            ErrorKind::Invalid => 400,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict | ErrorKind::NeedsForce => 409,
            ErrorKind::Unavailable => 503,
            ErrorKind::Internal => 500,
        }
    }
}

/// A request that was not done. Nothing was changed unless the message says so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What sort.
    pub kind: ErrorKind,
    /// One sentence with the particulars, no full stop.
    pub message: String,
    /// What to do about it, may be empty.
    pub hint: String,
}

/// What every method of a [`Service`](crate::Service) returns.
pub type ApiResult<T> = Result<T, ApiError>;

macro_rules! constructor {
    ($(#[$doc:meta])* $name:ident, $kind:ident) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(message: impl Into<String>, hint: impl Into<String>) -> ApiError {
            ApiError { kind: ErrorKind::$kind, message: message.into(), hint: hint.into() }
        }
    };
}

impl ApiError {
    constructor! {
        /// [`ErrorKind::Invalid`].
        invalid, Invalid
    }
    constructor! {
        /// [`ErrorKind::NotFound`].
        not_found, NotFound
    }
    constructor! {
        /// [`ErrorKind::Conflict`].
        conflict, Conflict
    }
    constructor! {
        /// [`ErrorKind::NeedsForce`].
        needs_force, NeedsForce
    }
    constructor! {
        /// [`ErrorKind::Unavailable`].
        unavailable, Unavailable
    }
    constructor! {
        /// [`ErrorKind::Internal`].
        internal, Internal
    }
}

/// The body of every answer that is not a success (`application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// For programs.
    pub code: ErrorKind,
    /// For people: what is wrong.
    pub message: String,
    /// For people: the way out, may be empty.
    #[serde(default)]
    pub hint: String,
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Problem {
        Problem {
            code: error.kind,
            message: error.message,
            hint: error.hint,
        }
    }
}

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> ApiError {
        ApiError {
            kind: problem.code,
            message: problem.message,
            hint: problem.hint,
        }
    }
}

//! What can go wrong in the server.

use std::fmt;

/// The result of the server's fallible calls.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with words for the user.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The model's files are missing, damaged, or of a kind that is not supported.
    Model(String),
    /// A request cannot be served as it stands.
    Request(String),
    /// The library refused a call.
    Library(ferroflash::Error),
}

impl Error {
    pub(crate) fn model(message: impl fmt::Display) -> Self {
        Error::Model(message.to_string())
    }

    pub(crate) fn request(message: impl fmt::Display) -> Self {
        Error::Request(message.to_string())
    }

    /// Puts the name of what was being read before the message.
    pub(crate) fn within(self, what: impl fmt::Display) -> Self {
        match self {
            Error::Model(message) => Error::Model(format!("{what}: {message}")),
            other => other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Model(message) | Error::Request(message) => f.write_str(message),
            Error::Library(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

impl From<ferroflash::Error> for Error {
    fn from(error: ferroflash::Error) -> Self {
        Error::Library(error)
    }
}

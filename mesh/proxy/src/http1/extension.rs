//! Chunk extensions (RFC 9112 section 7.1.1): `;name`, `;name=token`, `;name="quoted"`. They mean nothing to us and are
//! not sent on, but what breaks their grammar is where parsers begin to disagree about where a line ends.

use super::chars::is_token;

/// Where in an extension the reader is; it starts behind the semicolon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extension {
    /// Before the name.
    NameStart,
    /// In the name.
    Name,
    /// Behind `=`.
    ValueStart,
    /// In a value without quotes.
    Value,
    /// In a quoted value.
    Quoted,
    /// Behind a backslash in a quoted value.
    Escaped,
    /// Behind a quoted value, or behind blanks that follow a name or a value.
    After,
}

impl Extension {
    /// Takes a byte of the line in; `None` if it may not stand there.
    pub(super) fn next(self, byte: u8) -> Option<Self> {
        let blank = byte == b' ' || byte == b'\t';
        let token = is_token(&[byte]);
        Some(match self {
            Self::NameStart if blank => Self::NameStart,
            Self::NameStart | Self::Name if token => Self::Name,
            Self::Name | Self::After if byte == b'=' => Self::ValueStart,
            Self::Name | Self::Value | Self::After if byte == b';' => Self::NameStart,
            Self::Name | Self::Value | Self::After if blank => Self::After,
            Self::ValueStart if blank => Self::ValueStart,
            Self::ValueStart if byte == b'"' => Self::Quoted,
            Self::ValueStart | Self::Value if token => Self::Value,
            Self::Quoted if byte == b'"' => Self::After,
            Self::Quoted if byte == b'\\' => Self::Escaped,
            // qdtext and quoted-pair: blanks, visible characters and obs-text.
            Self::Quoted | Self::Escaped if blank || byte > 0x20 && byte != 0x7f => Self::Quoted,
            _ => return None,
        })
    }

    /// Whether the line may end here.
    pub(super) fn may_end(self) -> bool {
        matches!(self, Self::Name | Self::Value | Self::After)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good(text: &str) -> bool {
        text.bytes()
            .try_fold(Extension::NameStart, Extension::next)
            .is_some_and(Extension::may_end)
    }

    #[test]
    fn chunk_extensions_follow_their_grammar_or_are_refused() {
        for text in ["a", "a=b", "a;b=c", " a = b ; c", "a=\"x y\\\"z\"", "a=\"\";b"] {
            assert!(good(text), "{text:?}");
        }
        for text in [
            "",
            ";",
            "a;",
            "a=",
            "=b",
            "a=\"open",
            "a=\"x\u{0}\"",
            "a\u{7f}",
            "a=b\"",
            "(a)",
        ] {
            assert!(!good(text), "{text:?}");
        }
    }
}

//! Keys and values of a section, and what is wrong with them.
//!
//! Each reader gives the value and its place; a value of another type is noted and reads as absent.

use alloc::{
    borrow::ToOwned,
    format,
    string::{String, ToString},
    vec::Vec,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Location, Parser, Section, Severity};

impl Parser<'_> {
    /// Line and column of a byte of the text.
    pub(super) fn location(&self, offset: usize) -> Location {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Location {
            line: before.bytes().filter(|b| *b == b'\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    /// An error at a key of a section.
    pub(super) fn bad(&mut self, s: &Section<'_>, at: Location, key: &str, text: String) {
        let separator = if s.path.is_empty() { "" } else { "." };
        let key = format!("{}{separator}{key}", s.path);
        self.config
            .note(Severity::Error, at, s.vm.as_deref(), &key, text);
    }

    /// Notes that a value is of another type.
    pub(super) fn wrong_type(
        &mut self,
        s: &Section<'_>,
        at: Location,
        key: &str,
        want: &str,
        found: &DeValue<'_>,
    ) {
        self.bad(s, at, key, format!("must be {want}; found {}", kind(found)));
    }

    /// Notes every key that is not among the allowed ones.
    pub(super) fn check_keys(&mut self, s: &Section<'_>, allowed: &[&str]) {
        for (key, _) in s.table {
            let name = key.get_ref();
            if allowed.contains(&name.as_ref()) {
                continue;
            }
            let near = allowed
                .iter()
                .map(|candidate| (distance(name, candidate), candidate))
                .filter(|(d, _)| *d <= 1 + name.len() / 4)
                // Of two that are as near, the one that the word is the beginning of.
                .min_by_key(|(d, candidate)| (*d, !candidate.starts_with(&**name)));
            let text = match near {
                Some((_, near)) => format!("unknown key; did you mean {near}?"),
                None => format!("unknown key; allowed: {}", allowed.join(", ")),
            };
            let at = self.location(key.span().start);
            self.bad(s, at, &printable(name), text);
        }
    }

    /// The value of a key, if the section has it.
    pub(super) fn value<'s>(
        &self,
        s: &Section<'s>,
        key: &str,
    ) -> Option<(&'s DeValue<'s>, Location)> {
        let (_, value) = find(s.table, key)?;
        Some((value.get_ref(), self.location(value.span().start)))
    }

    /// The text of a key; that it is none is noted.
    pub(super) fn string<'s>(
        &mut self,
        s: &Section<'s>,
        key: &'static str,
    ) -> Option<(&'s str, Location)> {
        match self.value(s, key)? {
            (DeValue::String(text), at) => Some((text, at)),
            (other, at) => {
                self.wrong_type(s, at, key, "a string", other);
                None
            }
        }
    }

    /// The text of a key; that it is missing is noted.
    pub(super) fn required<'s>(
        &mut self,
        s: &Section<'s>,
        key: &'static str,
    ) -> Option<(&'s str, Location)> {
        if find(s.table, key).is_none() {
            self.bad(s, s.at, key, "missing".to_owned());
        }
        self.string(s, key)
    }

    /// `true` or `false`.
    pub(super) fn boolean(
        &mut self,
        s: &Section<'_>,
        key: &'static str,
    ) -> Option<(bool, Location)> {
        match self.value(s, key)? {
            (DeValue::Boolean(value), at) => Some((*value, at)),
            (other, at) => {
                self.wrong_type(s, at, key, "true or false", other);
                None
            }
        }
    }

    /// A section within the section.
    pub(super) fn table<'s>(
        &mut self,
        s: &Section<'s>,
        key: &'static str,
    ) -> Option<(&'s DeTable<'s>, Location)> {
        match self.value(s, key)? {
            (DeValue::Table(table), at) => Some((table, at)),
            (other, at) => {
                self.wrong_type(s, at, key, "a table", other);
                None
            }
        }
    }

    /// One of these words.
    pub(super) fn choice<T: Copy>(
        &mut self,
        s: &Section<'_>,
        key: &'static str,
        allowed: &[(&str, T)],
    ) -> Option<T> {
        let (text, at) = self.string(s, key)?;
        let found = allowed.iter().find(|(name, _)| *name == text);
        if found.is_none() {
            let names: Vec<_> = allowed.iter().map(|(name, _)| quote(name)).collect();
            let message = format!("{} is unknown; allowed: {}", quote(text), names.join(", "));
            self.bad(s, at, key, message);
        }
        found.map(|(_, value)| *value)
    }
}

pub(super) fn find<'s>(
    table: &'s DeTable<'s>,
    key: &str,
) -> Option<(
    &'s Spanned<toml::de::DeString<'s>>,
    &'s Spanned<DeValue<'s>>,
)> {
    table.iter().find(|(k, _)| k.get_ref() == key)
}

/// The type of a value, in words.
pub(super) fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a point",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A string or number as written.
pub(super) fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => quote(text),
        DeValue::Integer(n) => printable(&n.to_string()),
        other => kind(other).to_owned(),
    }
}

/// Text of the file, fit for one line of a terminal.
pub(super) fn printable(text: &str) -> String {
    const SHOWN: usize = 40;
    let mut out: String = text
        .chars()
        .take(SHOWN)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(SHOWN).is_some() {
        out += "..";
    }
    out
}

pub(super) fn quote(text: &str) -> String {
    format!("\"{}\"", printable(text))
}

/// "256M", "1G", "2T": bytes, saturating. `None`: not of this form.
pub(super) fn memory_size(text: &str) -> Option<u64> {
    let unit: u64 = match text.bytes().last()?.to_ascii_uppercase() {
        b'M' => 1 << 20,
        b'G' => 1 << 30,
        b'T' => 1 << 40,
        _ => return None,
    };
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // All digits, so the only failure is too large a number.
    Some(digits.parse().unwrap_or(u64::MAX).saturating_mul(unit))
}

/// Letters to insert, delete or replace to get from one word to the other (Levenshtein).
/// Long words are not looked at: they are far from every key.
pub(crate) fn distance(from: &str, to: &str) -> usize {
    const LONGEST: usize = 32;
    if from.len() > LONGEST {
        return from.len();
    }
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

//! One record: length, checksum, payload.
//!
//! `[u32 length][u32 crc32][payload]`, little-endian; the payload is `[u8 kind][u64 rv][u16 resource length][resource][u32 key length][key][json]`.

/// Header of a record.
pub(crate) const HEADER: usize = 8;
/// Longer records cannot be ours: the largest request body is 3 MiB.
pub(crate) const MAX_PAYLOAD: usize = 16 << 20;

const PUT: u8 = 1;
const DELETE: u8 = 2;
/// Says up to which version a snapshot is complete; the last record of one.
const END: u8 = 3;

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut out = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut c = i as u32;
        let mut bit = 0;
        while bit < 8 {
            c = if c & 1 == 1 {
                0xEDB8_8320 ^ (c >> 1)
            } else {
                c >> 1
            };
            bit += 1;
        }
        out[i] = c;
        i += 1;
    }
    out
}

/// CRC-32 (IEEE 802.3).
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc = TABLE[((crc ^ u32::from(*byte)) & 0xFF) as usize] ^ (crc >> 8);
    }
    !crc
}

/// What a record says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Record<'a> {
    Put {
        resource: &'a str,
        key: &'a str,
        rv: u64,
        json: &'a [u8],
    },
    Delete {
        resource: &'a str,
        key: &'a str,
        rv: u64,
    },
    End {
        rv: u64,
    },
}

impl Record<'_> {
    pub(crate) fn rv(&self) -> u64 {
        match self {
            Record::Put { rv, .. } | Record::Delete { rv, .. } | Record::End { rv } => *rv,
        }
    }
}

fn frame(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    write(out);
    let (header, payload) = out[start..].split_at_mut(HEADER);
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[4..].copy_from_slice(&crc32(payload).to_le_bytes());
}

fn head(out: &mut Vec<u8>, kind: u8, resource: &str, key: &str, rv: u64) {
    out.push(kind);
    out.extend_from_slice(&rv.to_le_bytes());
    out.extend_from_slice(&(resource.len() as u16).to_le_bytes());
    out.extend_from_slice(resource.as_bytes());
    out.extend_from_slice(&(key.len() as u32).to_le_bytes());
    out.extend_from_slice(key.as_bytes());
}

pub(crate) fn put(out: &mut Vec<u8>, resource: &str, key: &str, rv: u64, json: &[u8]) {
    frame(out, |out| {
        head(out, PUT, resource, key, rv);
        out.extend_from_slice(json);
    });
}

pub(crate) fn delete(out: &mut Vec<u8>, resource: &str, key: &str, rv: u64) {
    frame(out, |out| head(out, DELETE, resource, key, rv));
}

pub(crate) fn end(out: &mut Vec<u8>, rv: u64) {
    frame(out, |out| head(out, END, "", "", rv));
}

/// Why no record could be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The file ends here, cleanly.
    End,
    /// The file ends within a record.
    Torn,
    /// The bytes are there and wrong.
    Damaged(&'static str),
}

/// Read the record at the front; returns it with its whole length.
pub(crate) fn read(bytes: &[u8]) -> Result<(Record<'_>, usize), Stop> {
    if bytes.is_empty() {
        return Err(Stop::End);
    }
    let Some((header, rest)) = bytes.split_at_checked(HEADER) else {
        return Err(Stop::Torn);
    };
    let length = u32_at(header, 0) as usize;
    let crc = u32_at(header, 4);
    if length > MAX_PAYLOAD {
        return Err(Stop::Damaged("a record of impossible length"));
    }
    let Some(payload) = rest.get(..length) else {
        return Err(Stop::Torn);
    };
    if crc32(payload) != crc {
        return Err(Stop::Damaged("a record whose checksum does not match"));
    }
    parse(payload)
        .map(|r| (r, HEADER + length))
        .ok_or(Stop::Damaged("a record that cannot be read"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn parse(payload: &[u8]) -> Option<Record<'_>> {
    let (kind, rest) = payload.split_first()?;
    let (rv, rest) = rest.split_at_checked(8)?;
    let rv = u64::from_le_bytes(rv.try_into().ok()?);
    let (length, rest) = rest.split_at_checked(2)?;
    let (resource, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(length.try_into().ok()?)))?;
    let (length, rest) = rest.split_at_checked(4)?;
    let (key, json) = rest.split_at_checked(u32::from_le_bytes(length.try_into().ok()?) as usize)?;
    let resource = std::str::from_utf8(resource).ok()?;
    let key = std::str::from_utf8(key).ok()?;
    match *kind {
        PUT => Some(Record::Put {
            resource,
            key,
            rv,
            json,
        }),
        DELETE => Some(Record::Delete { resource, key, rv }),
        END => Some(Record::End { rv }),
        _ => None,
    }
}

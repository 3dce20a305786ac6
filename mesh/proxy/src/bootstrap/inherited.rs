//! Listening sockets handed over by the parent process: `SERIN_LISTENERS="8080=3,8443=4"` says that the listener of
//! port 8080 uses descriptor 3. So a gateway listens where it could not bind itself, and a restart refuses nobody.

use std::collections::HashMap;
use std::net::TcpListener;

use crate::error::Error;
use crate::sys;

/// The variable.
pub const VARIABLE: &str = "SERIN_LISTENERS";

/// Parses the variable: port to descriptor.
pub fn parse(text: &str) -> Result<Vec<(u16, i32)>, Error> {
    text.split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .map(|entry| {
            let pair = entry
                .split_once('=')
                .and_then(|(port, fd)| Some((port.parse().ok()?, fd.parse().ok()?)));
            pair.ok_or_else(|| Error::Environment {
                name: VARIABLE,
                reason: format!("{entry:?} is not port=descriptor"),
            })
        })
        .collect()
}

/// Takes the sockets over.
pub fn adopt(text: &str) -> Result<HashMap<u16, TcpListener>, Error> {
    parse(text)?
        .into_iter()
        .map(|(port, fd)| {
            let socket = sys::adopt_listener(fd).map_err(|error| Error::Environment {
                name: VARIABLE,
                reason: format!("descriptor {fd}: {error}"),
            })?;
            Ok((port, socket))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn the_variable_names_ports_and_descriptors() {
        assert_eq!(parse("8080=3, 8443=4,").unwrap(), [(8080, 3), (8443, 4)]);
        assert!(parse("").unwrap().is_empty());
        for bad in ["8080", "x=3", "8080=x", "70000=3"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_inherited_socket_is_taken_over_and_a_closed_one_is_told() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let adopted = adopt(&format!("8080={}", socket.into_raw_fd())).unwrap();
        assert_eq!(adopted[&8080].local_addr().unwrap(), address);
        assert!(
            adopt("8080=900")
                .unwrap_err()
                .to_string()
                .contains("descriptor 900")
        );
        assert!(adopt("8080=1").is_err());
    }
}

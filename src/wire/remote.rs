//! One connection of the remote dialect (img-proxy.sock, img-cache.sock), as the server reads it.
//!
//! A client sends a header. A writer goes on with the image's raw bytes; or, in the CRIU of May 2020, it
//! sends one byte that carries a pipe, and the bytes come there. A reader waits for an answer and may
//! then send such a byte. `D` stands for the descriptor. A descriptor belongs to the last byte of the
//! recvmsg(2) that returned it, and that byte is never image data.

use super::{WireError, criu, criu::Request, frame::FrameReader};

/// What one receive brought.
#[derive(Debug, PartialEq, Eq)]
pub struct Fed<'a, D> {
    /// The header, when this receive completed it.
    pub request: Option<Request>,
    /// Bytes of the image.
    pub data: &'a [u8],
    /// The pipe that takes the socket's place.
    pub pipe: Option<D>,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Remote {
    state: State,
}

#[derive(Debug)]
enum State {
    Header(FrameReader),
    /// A writer's bytes; `pure` until the first of them has come: only then may a pipe.
    Image {
        pure: bool,
    },
    /// A reader; once it has its answer it may ask for a pipe.
    Reader {
        answered: bool,
    },
    /// Nothing more belongs on this socket.
    Over,
}

impl Default for Remote {
    fn default() -> Self {
        Self { state: State::Header(FrameReader::default()) }
    }
}

impl Remote {
    /// Takes what one recvmsg(2) returned: at least one byte.
    pub fn feed<'a, D>(
        &mut self,
        mut input: &'a [u8],
        descriptor: Option<D>,
    ) -> Result<Fed<'a, D>, WireError> {
        let mut fed = Fed { request: None, data: &[], pipe: None };
        if let State::Header(reader) = &mut self.state {
            let Some(body) = reader.feed(&mut input)? else {
                return match descriptor {
                    None => Ok(fed),
                    Some(_) => Err(WireError::Descriptor("a descriptor inside its header")),
                };
            };
            let request = criu::decode_request(&body)?;
            self.state = match request {
                Request::Read(_) => State::Reader { answered: false },
                Request::Write(..) => State::Image { pure: true },
                Request::Finish { .. } => State::Over,
            };
            fed.request = Some(request);
        }
        match (&mut self.state, descriptor) {
            (State::Image { pure: true } | State::Reader { answered: true }, Some(pipe))
                if input.len() == 1 =>
            {
                fed.pipe = Some(pipe);
                self.state = State::Over;
            }
            (_, Some(_)) => {
                return Err(WireError::Descriptor("a descriptor where none belongs"));
            }
            (State::Image { pure }, None) => {
                *pure &= input.is_empty();
                fed.data = input;
            }
            (_, None) if input.is_empty() => {}
            // What old CRIU may write after a finish means nothing.
            (State::Over, None) => {}
            (_, None) => return Err(WireError::Unexpected("where it can only read")),
        }
        Ok(fed)
    }

    /// The reader has its answer: it may send a pipe now.
    pub fn answered(&mut self) {
        if let State::Reader { answered } = &mut self.state {
            *answered = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Key, criu::WriteMode};

    fn header(write: Option<WriteMode>) -> Vec<u8> {
        criu::encode_request(&Key::new(*b"dir", *b"pages-1.img"), write)
    }

    #[test]
    fn raw_bytes_glued_to_the_header() {
        let mut bytes = header(Some(WriteMode::Append));
        bytes.extend(b"abc");
        let mut remote = Remote::default();
        let fed = remote.feed::<u8>(&bytes, None).unwrap();
        assert!(matches!(fed.request, Some(Request::Write(_, WriteMode::Append))));
        assert_eq!(fed.data, b"abc");
        assert_eq!(remote.feed::<u8>(b"de", None).unwrap().data, b"de");
        // Once raw bytes have come it is too late for a pipe.
        assert!(matches!(remote.feed(b"x", Some(1)), Err(WireError::Descriptor(_))));
    }

    #[test]
    fn a_pipe_glued_to_the_header_or_alone() {
        for write in [Some(WriteMode::Truncate), None] {
            let mut glued = header(write);
            glued.push(0);
            let fed = Remote::default().feed(&glued, Some(7));
            // A reader's pipe follows the answer.
            assert_eq!(fed.ok().and_then(|fed| fed.pipe), write.map(|_| 7));

            let mut remote = Remote::default();
            assert!(remote.feed::<u8>(&header(write), None).unwrap().request.is_some());
            remote.answered();
            let fed = remote.feed(b"\0", Some(7)).unwrap();
            assert_eq!((fed.data, fed.pipe), (&b""[..], Some(7)), "its byte is not image data");
        }
    }

    #[test]
    fn descriptors_where_none_belongs() {
        let whole = header(None);
        assert!(Remote::default().feed(&whole[..5], Some(1)).is_err());
        assert!(Remote::default().feed(&whole, Some(1)).is_err(), "on the header's last byte");
        let mut late = header(Some(WriteMode::Append));
        late.extend(b"ab");
        assert!(Remote::default().feed(&late, Some(1)).is_err(), "behind a byte of the image");
    }

    #[test]
    fn a_reader_only_reads() {
        let mut remote = Remote::default();
        remote.feed::<u8>(&header(None), None).unwrap();
        assert!(matches!(remote.feed::<u8>(b"x", None), Err(WireError::Unexpected(_))));
    }
}

//! Statistics on their way to who asked: written piece by piece as the connection takes them, so that neither the series of
//! thousands of clusters nor their text are ever there at a time.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use http_body::{Body, Frame};
use http_body_util::Full;

use super::super::scrape::{Order, Scrape};
use super::Proxy;
use crate::metrics::collect::Family;
use crate::metrics::names::{self, Buckets};
use crate::metrics::select::Select;
use crate::metrics::text::Encoding;

/// How statistics are written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    /// `name: value`.
    Text(Buckets),
    /// Envoy's JSON.
    Json(Buckets),
    /// For Prometheus.
    Prometheus(Encoding),
}

/// An answer that is there whole, or comes in pieces.
pub(super) enum Answer {
    /// Whole.
    Whole(Response<Full<Bytes>>),
    /// In pieces.
    Pieces(Response<Box<Telling>>),
}

impl From<Response<Full<Bytes>>> for Answer {
    fn from(response: Response<Full<Bytes>>) -> Self {
        Self::Whole(response)
    }
}

/// See the module.
pub(super) struct Telling {
    scrape: Scrape,
    form: Form,
    /// Histograms come last.
    histograms: String,
    /// Families that wait for the rest, where their names change: series of one may come from several.
    waiting: Vec<Family>,
    json_histograms: Vec<serde_json::Value>,
    /// Entries of JSON written.
    entries: u64,
    began: bool,
    ended: bool,
}

impl Telling {
    /// Looks now.
    pub(super) fn new(proxy: &Arc<Proxy>, select: Select, form: Form) -> Self {
        let order = match form {
            Form::Text(_) | Form::Json(_) => Order::ByCluster,
            Form::Prometheus(_) => Order::ByFamily,
        };
        Self {
            scrape: Scrape::new(proxy, select, order),
            form,
            histograms: String::new(),
            waiting: Vec::new(),
            json_histograms: Vec::new(),
            entries: 0,
            began: false,
            ended: false,
        }
    }

    /// The answer: at once where it is small.
    pub(super) fn answer(mut self) -> Answer {
        let content_type = match self.form {
            Form::Text(_) => "text/plain; charset=utf-8",
            Form::Json(_) => "application/json",
            Form::Prometheus(encoding) => encoding.content_type(),
        };
        let mut head = Response::new(());
        head.headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        if self.scrape.is_small() {
            let mut whole = Vec::new();
            while let Some(piece) = self.next() {
                whole.extend(piece);
            }
            return Answer::Whole(head.map(|()| Full::new(whole.into())));
        }
        Answer::Pieces(head.map(|()| Box::new(self)))
    }

    /// The next piece that holds something.
    fn next(&mut self) -> Option<Vec<u8>> {
        while !self.ended {
            let out = self.write();
            if !out.is_empty() {
                return Some(out);
            }
        }
        None
    }

    fn write(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        if !std::mem::replace(&mut self.began, true)
            && let Form::Json(_) = self.form
        {
            out.extend_from_slice(b"{\"stats\":[");
        }
        match self.scrape.piece() {
            Some(mut families) => match self.form {
                Form::Text(buckets) => {
                    let [simple, histograms] = names::text(&families, buckets);
                    self.histograms.push_str(&histograms);
                    out.extend(simple.into_bytes());
                }
                Form::Json(buckets) => {
                    let [simple, histograms] = names::json(&families, buckets);
                    self.json_histograms.extend(histograms);
                    for entry in simple {
                        self.entry(&mut out, &entry);
                    }
                }
                Form::Prometheus(_) if self.scrape.tags().rename() => self.waiting.append(&mut families),
                Form::Prometheus(encoding) => {
                    self.scrape.tags().add_fixed(&mut families);
                    out = encoding.write(&families);
                }
            },
            None => {
                self.ended = true;
                match self.form {
                    Form::Text(_) => out.extend(std::mem::take(&mut self.histograms).into_bytes()),
                    Form::Json(buckets) => {
                        let told = std::mem::take(&mut self.json_histograms);
                        if !told.is_empty() {
                            let histograms = names::json_histograms(told, buckets);
                            self.entry(&mut out, &histograms);
                        }
                        out.extend_from_slice(b"]}\n");
                    }
                    Form::Prometheus(encoding) => {
                        let waiting = std::mem::take(&mut self.waiting);
                        if !waiting.is_empty() {
                            out = encoding.write_renamed(&self.scrape.tags().renamed(waiting));
                        }
                        out.extend_from_slice(encoding.end());
                    }
                }
            }
        }
        out
    }
}

impl Telling {
    /// Writes an entry of JSON.
    fn entry(&mut self, out: &mut Vec<u8>, entry: &serde_json::Value) {
        if self.entries > 0 {
            out.push(b',');
        }
        self.entries += 1;
        out.extend(entry.to_string().into_bytes());
    }
}

impl Body for Telling {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let piece = self.get_mut().next();
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece.into()))))
    }
}

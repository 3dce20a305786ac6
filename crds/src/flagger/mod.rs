//! Flagger: Canary, MetricTemplate, AlertProvider (`flagger.app/v1beta1`).
//!
//! Every field of Flagger's schema is here under its name. Fields whose doc comment starts with *Ours* are additions:
//! all optional, so that manifests written for Flagger keep their meaning and an object without them is written back
//! as it was.

mod analysis;
mod canary;
mod route;
mod service;
mod status;
mod template;

pub use analysis::*;
pub use canary::*;
pub use route::*;
pub use service::*;
pub use status::*;
pub use template::*;

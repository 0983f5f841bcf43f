//! HTTP over a [`Service`]: `/v1/...`, `/metrics`, `/openapi.json`, on a unix socket.
//!
//! Everything that is not a success is a [`Problem`], also what the router itself refuses (unknown path, wrong
//! method, a body that is too long or not JSON): a client parses one form of failure.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{
    DefaultBodyLimit, FromRequest, FromRequestParts, Path as UrlPath, Query, Request, State,
};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use snapshot::SnapshotName;
use tokio::net::{UnixListener, UnixStream};
use types::{DiskId, HostId};
use utoipa::OpenApi;

use crate::api::object;
use crate::check::{is_hidden, snapshot_name};
pub use crate::serve::{CONNECTIONS_MAX, REQUEST_WAIT, serve};
use crate::{
    ApiError, ApiResult, AttachBody, DetachBody, DiskAddBody, DiskInfo, DiskReplaceBody, HostInfo,
    LeftoverInfo, Name, PoolCreateBody, PoolInfo, Problem, RebalancePlan, RollbackBody, ScrubBody,
    ScrubStatus, Service, SnapshotCreateBody, SnapshotInfo, SnapshotProtectBody, StatusInfo, VdiCreateBody,
    VdiInfo, VdiResizeBody, VersionInfo,
};

/// Longest request body.
pub const BODY_BYTES_MAX: usize = 1 << 20;

/// Characters of a client's words that a refusal repeats.
const TEXT_SHOWN_MAX: usize = 200;

/// The API as a document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Weft",
        description = "Pools local disks into replicated virtual disks."
    ),
    paths(
        pool_create,
        pool_status,
        rebalance_plan,
        rebalance_start,
        host_list,
        host_remove,
        host_drain,
        disk_add,
        disk_list,
        disk_remove,
        disk_replace,
        leftovers,
        leftovers_drop,
        vdi_create,
        vdi_list,
        vdi_show,
        vdi_resize,
        vdi_delete,
        vdi_attach,
        vdi_detach,
        vdi_rollback,
        snapshot_create,
        snapshot_list,
        snapshot_delete,
        snapshot_protect,
        scrub_start,
        scrub_status,
        status,
        version,
        metrics
    ),
    components(schemas(Problem))
)]
struct Document;

/// The API as an OpenAPI 3.1 document in JSON.
///
/// # Panics
/// Never: the document is fixed at compile time.
#[must_use]
pub fn openapi() -> String {
    Document::openapi()
        .to_pretty_json()
        .expect("a document of plain strings and numbers")
}

/// All routes over `service`.
pub fn router<S: Service>(service: Arc<S>) -> Router {
    Router::new()
        .route("/v1/pool", get(pool_status::<S>).post(pool_create::<S>))
        .route("/v1/rebalance", get(rebalance_plan::<S>))
        .route("/v1/rebalance", post(rebalance_start::<S>))
        .route("/v1/hosts", get(host_list::<S>))
        .route("/v1/hosts/{id}", axum::routing::delete(host_remove::<S>))
        .route("/v1/hosts/{id}/drain", post(host_drain::<S>))
        .route("/v1/disks", get(disk_list::<S>).post(disk_add::<S>))
        .route("/v1/disks/{id}", axum::routing::delete(disk_remove::<S>))
        .route("/v1/disks/{id}/replace", post(disk_replace::<S>))
        .route("/v1/disks/{id}/leftovers", get(leftovers::<S>))
        .route(
            "/v1/disks/{id}/leftovers",
            axum::routing::delete(leftovers_drop::<S>),
        )
        .route("/v1/vdis", get(vdi_list::<S>).post(vdi_create::<S>))
        .route("/v1/vdis/{name}", get(vdi_show::<S>).delete(vdi_delete::<S>))
        .route("/v1/vdis/{name}/resize", post(vdi_resize::<S>))
        .route("/v1/vdis/{name}/attach", post(vdi_attach::<S>))
        .route("/v1/vdis/{name}/detach", post(vdi_detach::<S>))
        .route("/v1/vdis/{name}/rollback", post(vdi_rollback::<S>))
        .route("/v1/snapshots", post(snapshot_create::<S>))
        .route("/v1/vdis/{name}/snapshots", get(snapshot_list::<S>))
        .route(
            "/v1/vdis/{name}/snapshots/{snapshot}",
            axum::routing::delete(snapshot_delete::<S>),
        )
        .route(
            "/v1/vdis/{name}/snapshots/{snapshot}/protect",
            post(snapshot_protect::<S>),
        )
        .route("/v1/scrub", get(scrub_status::<S>).post(scrub_start::<S>))
        .route("/v1/status", get(status::<S>))
        .route("/v1/version", get(version::<S>))
        .route("/metrics", get(metrics::<S>))
        .route("/openapi.json", get(document))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn(no_stray_query))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(service)
}

/// Binds the API's socket at `path`, for its owner only. A socket that a dead daemon left is replaced; one that
/// somebody answers on, or anything that is not a socket, is not.
///
/// # Errors
/// `AddrInUse` when another daemon answers there, `AlreadyExists` when it is not a socket, or the kernel's.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            let text = format!("{} exists and is not a socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            let text = format!("another daemon answers on {}", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Bound in a private directory first: between bind and chmod nobody else can connect.
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let private = parent.join(format!(".weft-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&private);
    std::fs::create_dir(&private)?;
    let bound = bind_in(&private, path);
    let _ = std::fs::remove_dir_all(&private);
    bound
}

fn bind_in(private: &Path, path: &Path) -> io::Result<UnixListener> {
    std::fs::set_permissions(private, std::fs::Permissions::from_mode(0o700))?;
    let inside = private.join("s");
    let listener = UnixListener::bind(&inside)?;
    std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&inside, path)?;
    Ok(listener)
}

/// A JSON body that becomes `T`, or a [`Problem`].
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Body<T>, Response> {
        if let Some(refusal) = wrong_content_type(&request) {
            return Err(refusal);
        }
        let bytes = tokio::time::timeout(REQUEST_WAIT, Bytes::from_request(request, state));
        let bytes = bytes.await.map_err(|_| {
            let message = format!(
                "the request's body was not there after {} s",
                REQUEST_WAIT.as_secs()
            );
            problem(
                StatusCode::REQUEST_TIMEOUT,
                ApiError::invalid(message, "send it at once"),
            )
        })?;
        let bytes = bytes.map_err(|rejection| {
            let hint = if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                format!("bodies have at most {BODY_BYTES_MAX} bytes")
            } else {
                String::new()
            };
            problem(rejection.status(), ApiError::invalid(rejection.body_text(), hint))
        })?;
        parse_body(&bytes).map(Body).map_err(IntoResponse::into_response)
    }
}

/// Refuses a body that says it is something else than JSON; one that says nothing is taken for JSON.
fn wrong_content_type(request: &Request) -> Option<Response> {
    let given = request.headers().get(header::CONTENT_TYPE)?;
    let given = String::from_utf8_lossy(given.as_bytes());
    let kind = given.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return None;
    }
    let message = format!("a body of type '{}' is not what this path takes", plain(&given));
    let error = ApiError::invalid(message, "send JSON with content-type: application/json");
    Some(problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, error))
}

/// Refuses a query where none is known: `?force=true` on a path that does not take it must not be overlooked.
async fn no_stray_query(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let takes_query = request.method() == Method::DELETE
        && ["/v1/disks/", "/v1/hosts/"]
            .iter()
            .any(|start| path.starts_with(start));
    match request.uri().query() {
        Some(query) if !query.is_empty() && !takes_query => {
            let message = format!("{} does not take the query '{}'", plain(path), plain(query));
            ApiError::invalid(message, "GET /openapi.json describes it").into_response()
        }
        _ => next.run(request).await,
    }
}

/// Reads a request's body.
///
/// # Errors
/// When it is not JSON, or not of this form. The message is one line of bounded length, whatever was sent.
pub fn parse_body<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let body = object(&mut reader).and_then(|body| reader.end().map(|()| body));
    body.map_err(|error| {
        // What is quoted in the complaint is the client's: it may be a megabyte, or move a terminal's cursor.
        let complaint = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let reason = complaint.strip_suffix(&place).unwrap_or(&complaint);
        ApiError::invalid(
            format!(
                "the request's body is not what this path takes: {}{place}",
                plain(reason)
            ),
            "GET /openapi.json describes it",
        )
    })
}

/// The beginning of a client's own words, for a message of one line.
fn plain(text: &str) -> String {
    let mut characters = text.chars();
    let mut plain: String = characters
        .by_ref()
        .take(TEXT_SHOWN_MAX)
        .map(|c| if is_hidden(c) { '?' } else { c })
        .collect();
    if characters.next().is_some() {
        plain.push_str("...");
    }
    plain
}

/// The name in the path, checked.
struct VdiName(Name);

impl<S: Send + Sync> FromRequestParts<S> for VdiName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> ApiResult<VdiName> {
        let UrlPath(text) = url_path(parts, state).await?;
        text.parse().map(VdiName)
    }
}

/// The names of a VDI and of a snapshot in the path, checked.
struct VdiSnapshot(Name, SnapshotName);

impl<S: Send + Sync> FromRequestParts<S> for VdiSnapshot {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> ApiResult<VdiSnapshot> {
        let UrlPath((vdi, snapshot)) = UrlPath::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| ApiError::invalid(plain(&rejection.body_text()), ""))?;
        Ok(VdiSnapshot(vdi.parse()?, snapshot_name(&snapshot)?))
    }
}

/// The disk id in the path, checked.
struct Disk(DiskId);

impl<S: Send + Sync> FromRequestParts<S> for Disk {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> ApiResult<Disk> {
        let UrlPath(text) = url_path(parts, state).await?;
        text.parse::<DiskId>()
            .map(Disk)
            .map_err(|error| ApiError::invalid(plain(&error.to_string()), "`weft disk list` shows the ids"))
    }
}

/// The host id in the path, checked.
struct Host(HostId);

impl<S: Send + Sync> FromRequestParts<S> for Host {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> ApiResult<Host> {
        let UrlPath(text) = url_path(parts, state).await?;
        text.parse::<HostId>()
            .map(Host)
            .map_err(|error| ApiError::invalid(plain(&error.to_string()), "`weft host list` shows the ids"))
    }
}

async fn url_path<S: Send + Sync>(
    parts: &mut axum::http::request::Parts,
    state: &S,
) -> ApiResult<UrlPath<String>> {
    UrlPath::<String>::from_request_parts(parts, state)
        .await
        .map_err(|rejection| ApiError::invalid(plain(&rejection.body_text()), ""))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.status()).expect("statuses are valid");
        problem(status, self)
    }
}

fn problem(status: StatusCode, error: ApiError) -> Response {
    let body = serde_json::to_vec(&Problem::from(error)).expect("three strings");
    (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
}

async fn no_such_path(request: Request) -> Response {
    let message = format!("there is nothing at {}", plain(request.uri().path()));
    ApiError::not_found(message, "GET /openapi.json lists the paths").into_response()
}

async fn no_such_method(request: Request) -> Response {
    let method = plain(request.method().as_str());
    let message = format!("{} does not take {method}", plain(request.uri().path()));
    let error = ApiError::invalid(message, "GET /openapi.json lists the methods");
    problem(StatusCode::METHOD_NOT_ALLOWED, error)
}

/// `?force=true`
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct Force {
    /// Although something is lost by it: see what the refusal without it says.
    #[serde(default)]
    force: bool,
}

type Api<S> = State<Arc<S>>;

#[utoipa::path(post, path = "/v1/pool", request_body = PoolCreateBody,
    responses((status = 200, body = PoolInfo), (status = "default", body = Problem)))]
async fn pool_create<S: Service>(
    State(api): Api<S>,
    Body(body): Body<PoolCreateBody>,
) -> ApiResult<Json<PoolInfo>> {
    api.pool_create(body.try_into()?).await.map(Json)
}

#[utoipa::path(get, path = "/v1/pool",
    responses((status = 200, body = PoolInfo), (status = "default", body = Problem)))]
async fn pool_status<S: Service>(State(api): Api<S>) -> ApiResult<Json<PoolInfo>> {
    api.pool_status().await.map(Json)
}

#[utoipa::path(get, path = "/v1/rebalance",
    responses((status = 200, body = RebalancePlan), (status = "default", body = Problem)))]
async fn rebalance_plan<S: Service>(State(api): Api<S>) -> ApiResult<Json<RebalancePlan>> {
    api.rebalance_plan().await.map(Json)
}

#[utoipa::path(post, path = "/v1/rebalance",
    responses((status = 200, body = RebalancePlan), (status = "default", body = Problem)))]
async fn rebalance_start<S: Service>(State(api): Api<S>) -> ApiResult<Json<RebalancePlan>> {
    api.rebalance_start().await.map(Json)
}

#[utoipa::path(get, path = "/v1/hosts",
    responses((status = 200, body = Vec<HostInfo>), (status = "default", body = Problem)))]
async fn host_list<S: Service>(State(api): Api<S>) -> ApiResult<Json<Vec<HostInfo>>> {
    api.host_list().await.map(Json)
}

#[utoipa::path(post, path = "/v1/hosts/{id}/drain", params(("id" = String, Path)),
    responses((status = 200, body = HostInfo), (status = "default", body = Problem)))]
async fn host_drain<S: Service>(State(api): Api<S>, Host(host): Host) -> ApiResult<Json<HostInfo>> {
    api.host_drain(host).await.map(Json)
}

#[utoipa::path(delete, path = "/v1/hosts/{id}", params(("id" = String, Path), Force),
    responses((status = 200, body = HostInfo), (status = "default", body = Problem)))]
async fn host_remove<S: Service>(
    State(api): Api<S>,
    Host(host): Host,
    force: Result<Query<Force>, axum::extract::rejection::QueryRejection>,
) -> ApiResult<Json<HostInfo>> {
    let Query(force) = force
        .map_err(|rejection| ApiError::invalid(plain(&rejection.body_text()), "only ?force=true|false"))?;
    api.host_remove(host, force.force).await.map(Json)
}

#[utoipa::path(post, path = "/v1/disks", request_body = DiskAddBody,
    responses((status = 200, body = DiskInfo), (status = "default", body = Problem)))]
async fn disk_add<S: Service>(
    State(api): Api<S>,
    Body(body): Body<DiskAddBody>,
) -> ApiResult<Json<DiskInfo>> {
    api.disk_add(body.try_into()?).await.map(Json)
}

#[utoipa::path(get, path = "/v1/disks",
    responses((status = 200, body = Vec<DiskInfo>), (status = "default", body = Problem)))]
async fn disk_list<S: Service>(State(api): Api<S>) -> ApiResult<Json<Vec<DiskInfo>>> {
    api.disk_list().await.map(Json)
}

#[utoipa::path(delete, path = "/v1/disks/{id}", params(("id" = String, Path), Force),
    responses((status = 200, body = DiskInfo), (status = "default", body = Problem)))]
async fn disk_remove<S: Service>(
    State(api): Api<S>,
    Disk(disk): Disk,
    force: Result<Query<Force>, axum::extract::rejection::QueryRejection>,
) -> ApiResult<Json<DiskInfo>> {
    let Query(force) = force
        .map_err(|rejection| ApiError::invalid(plain(&rejection.body_text()), "only ?force=true|false"))?;
    api.disk_remove(disk, force.force).await.map(Json)
}

#[utoipa::path(post, path = "/v1/disks/{id}/replace", params(("id" = String, Path)), request_body = DiskReplaceBody,
    responses((status = 200, body = DiskInfo), (status = "default", body = Problem)))]
async fn disk_replace<S: Service>(
    State(api): Api<S>,
    Disk(disk): Disk,
    Body(body): Body<DiskReplaceBody>,
) -> ApiResult<Json<DiskInfo>> {
    api.disk_replace(disk, body.with.try_into()?).await.map(Json)
}

#[utoipa::path(get, path = "/v1/disks/{id}/leftovers", params(("id" = String, Path)),
    responses((status = 200, body = Vec<LeftoverInfo>), (status = "default", body = Problem)))]
async fn leftovers<S: Service>(State(api): Api<S>, Disk(disk): Disk) -> ApiResult<Json<Vec<LeftoverInfo>>> {
    api.leftovers(disk).await.map(Json)
}

#[utoipa::path(delete, path = "/v1/disks/{id}/leftovers", params(("id" = String, Path), Force),
    responses((status = 200, body = Vec<LeftoverInfo>), (status = "default", body = Problem)))]
async fn leftovers_drop<S: Service>(
    State(api): Api<S>,
    Disk(disk): Disk,
    force: Result<Query<Force>, axum::extract::rejection::QueryRejection>,
) -> ApiResult<Json<Vec<LeftoverInfo>>> {
    let Query(force) = force
        .map_err(|rejection| ApiError::invalid(plain(&rejection.body_text()), "only ?force=true|false"))?;
    api.leftovers_drop(disk, force.force).await.map(Json)
}

#[utoipa::path(post, path = "/v1/vdis", request_body = VdiCreateBody,
    responses((status = 200, body = VdiInfo), (status = "default", body = Problem)))]
async fn vdi_create<S: Service>(
    State(api): Api<S>,
    Body(body): Body<VdiCreateBody>,
) -> ApiResult<Json<VdiInfo>> {
    api.vdi_create(body.try_into()?).await.map(Json)
}

#[utoipa::path(get, path = "/v1/vdis",
    responses((status = 200, body = Vec<VdiInfo>), (status = "default", body = Problem)))]
async fn vdi_list<S: Service>(State(api): Api<S>) -> ApiResult<Json<Vec<VdiInfo>>> {
    api.vdi_list().await.map(Json)
}

#[utoipa::path(get, path = "/v1/vdis/{name}", params(("name" = String, Path)),
    responses((status = 200, body = VdiInfo), (status = "default", body = Problem)))]
async fn vdi_show<S: Service>(State(api): Api<S>, VdiName(name): VdiName) -> ApiResult<Json<VdiInfo>> {
    api.vdi_show(name).await.map(Json)
}

#[utoipa::path(post, path = "/v1/vdis/{name}/resize", params(("name" = String, Path)), request_body = VdiResizeBody,
    responses((status = 200, body = VdiInfo), (status = "default", body = Problem)))]
async fn vdi_resize<S: Service>(
    State(api): Api<S>,
    VdiName(name): VdiName,
    Body(body): Body<VdiResizeBody>,
) -> ApiResult<Json<VdiInfo>> {
    api.vdi_resize(name, body.check()?).await.map(Json)
}

#[utoipa::path(delete, path = "/v1/vdis/{name}", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn vdi_delete<S: Service>(State(api): Api<S>, VdiName(name): VdiName) -> ApiResult<StatusCode> {
    api.vdi_delete(name).await.map(|()| StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/vdis/{name}/attach", params(("name" = String, Path)), request_body = AttachBody,
    responses((status = 200, body = VdiInfo), (status = "default", body = Problem)))]
async fn vdi_attach<S: Service>(
    State(api): Api<S>,
    VdiName(name): VdiName,
    Body(body): Body<AttachBody>,
) -> ApiResult<Json<VdiInfo>> {
    api.vdi_attach(name, body.try_into()?).await.map(Json)
}

#[utoipa::path(post, path = "/v1/vdis/{name}/detach", params(("name" = String, Path)), request_body = DetachBody,
    responses((status = 200, body = VdiInfo), (status = "default", body = Problem)))]
async fn vdi_detach<S: Service>(
    State(api): Api<S>,
    VdiName(name): VdiName,
    Body(body): Body<DetachBody>,
) -> ApiResult<Json<VdiInfo>> {
    api.vdi_detach(name, body.try_into()?).await.map(Json)
}

#[utoipa::path(post, path = "/v1/vdis/{name}/rollback", params(("name" = String, Path)), request_body = RollbackBody,
    responses((status = 200, body = VdiInfo), (status = "default", body = Problem)))]
async fn vdi_rollback<S: Service>(
    State(api): Api<S>,
    VdiName(name): VdiName,
    Body(body): Body<RollbackBody>,
) -> ApiResult<Json<VdiInfo>> {
    api.vdi_rollback(name, body.try_into()?).await.map(Json)
}

#[utoipa::path(post, path = "/v1/snapshots", request_body = SnapshotCreateBody,
    responses((status = 200, body = Vec<SnapshotInfo>), (status = "default", body = Problem)))]
async fn snapshot_create<S: Service>(
    State(api): Api<S>,
    Body(body): Body<SnapshotCreateBody>,
) -> ApiResult<Json<Vec<SnapshotInfo>>> {
    api.snapshot_create(body.try_into()?).await.map(Json)
}

#[utoipa::path(get, path = "/v1/vdis/{name}/snapshots", params(("name" = String, Path)),
    responses((status = 200, body = Vec<SnapshotInfo>), (status = "default", body = Problem)))]
async fn snapshot_list<S: Service>(
    State(api): Api<S>,
    VdiName(name): VdiName,
) -> ApiResult<Json<Vec<SnapshotInfo>>> {
    api.snapshot_list(name).await.map(Json)
}

#[utoipa::path(delete, path = "/v1/vdis/{name}/snapshots/{snapshot}",
    params(("name" = String, Path), ("snapshot" = String, Path)),
    responses((status = 204), (status = "default", body = Problem)))]
async fn snapshot_delete<S: Service>(
    State(api): Api<S>,
    VdiSnapshot(vdi, snapshot): VdiSnapshot,
) -> ApiResult<StatusCode> {
    api.snapshot_delete(vdi, snapshot)
        .await
        .map(|()| StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/vdis/{name}/snapshots/{snapshot}/protect",
    params(("name" = String, Path), ("snapshot" = String, Path)), request_body = SnapshotProtectBody,
    responses((status = 200, body = SnapshotInfo), (status = "default", body = Problem)))]
async fn snapshot_protect<S: Service>(
    State(api): Api<S>,
    VdiSnapshot(vdi, snapshot): VdiSnapshot,
    Body(body): Body<SnapshotProtectBody>,
) -> ApiResult<Json<SnapshotInfo>> {
    api.snapshot_protect(vdi, snapshot, body.protected)
        .await
        .map(Json)
}

#[utoipa::path(post, path = "/v1/scrub", request_body = ScrubBody,
    responses((status = 200, body = ScrubStatus), (status = "default", body = Problem)))]
async fn scrub_start<S: Service>(
    State(api): Api<S>,
    Body(body): Body<ScrubBody>,
) -> ApiResult<Json<ScrubStatus>> {
    api.scrub_start(body.check()?).await.map(Json)
}

#[utoipa::path(get, path = "/v1/scrub",
    responses((status = 200, body = ScrubStatus), (status = "default", body = Problem)))]
async fn scrub_status<S: Service>(State(api): Api<S>) -> ApiResult<Json<ScrubStatus>> {
    api.scrub_status().await.map(Json)
}

#[utoipa::path(get, path = "/v1/status",
    responses((status = 200, body = StatusInfo), (status = "default", body = Problem)))]
async fn status<S: Service>(State(api): Api<S>) -> ApiResult<Json<StatusInfo>> {
    api.status().await.map(Json)
}

#[utoipa::path(get, path = "/v1/version",
    responses((status = 200, body = VersionInfo), (status = "default", body = Problem)))]
async fn version<S: Service>(State(api): Api<S>) -> ApiResult<Json<VersionInfo>> {
    api.version().await.map(Json)
}

#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String), (status = "default", body = Problem)))]
async fn metrics<S: Service>(State(api): Api<S>) -> ApiResult<Response> {
    let text = api.metrics().await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi()).into_response()
}

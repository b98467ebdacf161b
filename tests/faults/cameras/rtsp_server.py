"""A real RTSP server, GStreamer's, for the system's Python: `rtsp_server.py PORT [codec=…] [user=… password=…] …`.

It serves one moving picture at rtsp://127.0.0.1:PORT/live. Settings: `path` (else `/live`), `codec` jpeg (default) or
h264, `width`, `height`, `rate` (pictures a second), `first` (seconds before the first picture is sent), `user` with
`password` and `scheme` (basic, the default, or digest). Needs the Debian packages python3-gi,
gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-base, -good and, for h264, -bad.
"""

# ruff: noqa: ANN001, FBT003 - GStreamer's objects have no types, and its calls no names
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402 - the versions must be asked for first

ENCODERS = {
    "jpeg": "jpegenc ! rtpjpegpay name=pay0 pt=26",
    "h264": "videoconvert ! openh264enc gop-size=10 ! rtph264pay name=pay0 pt=96 config-interval=1",
}


def make_factory(settings):
    """The stream: moving noise, so that no two pictures are the same."""
    width, height, rate = (settings.get(name, usual) for name, usual in (("width", 160), ("height", 120), ("rate", 10)))
    form = f"video/x-raw,format=I420,width={width},height={height},framerate={rate}/1"
    factory = GstRtspServer.RTSPMediaFactory()
    source = f"videotestsrc is-live=true pattern=snow ! {form} ! valve name=valve drop=true"
    factory.set_launch(f"( {source} ! {ENCODERS[settings.get('codec', 'jpeg')]} )")
    factory.connect("media-configure", lambda _factory, media: open_valve(media, float(settings.get("first", 0))))
    return factory


def open_valve(media, after_s):
    """Let pictures through `after_s` seconds after a client has come."""
    valve = media.get_element().get_by_name("valve")
    GLib.timeout_add(round(1000 * after_s), lambda: bool(valve.set_property("drop", False)))


def make_auth(user, password, scheme):
    """Authentication that knows one user, who may see everything."""
    auth = GstRtspServer.RTSPAuth()
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    if scheme == "digest":
        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(user, password, token)
    else:
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    return auth


def main(arguments):
    """Serve until killed; takes connections when it is ready."""
    settings = dict(argument.split("=", 1) for argument in arguments[1:])
    Gst.init(None)
    server, factory = GstRtspServer.RTSPServer(), make_factory(settings)
    server.set_address("127.0.0.1")
    server.set_service(arguments[0])
    if "user" in settings:
        server.set_auth(make_auth(settings["user"], settings["password"], settings.get("scheme", "basic")))
        permissions = GstRtspServer.RTSPPermissions()
        permissions.add_permission_for_role("viewer", "media.factory.access", True)
        permissions.add_permission_for_role("viewer", "media.factory.construct", True)
        factory.set_permissions(permissions)
    server.get_mount_points().add_factory(settings.get("path", "/live"), factory)
    if not server.attach(None):
        sys.exit(f"port {arguments[0]} is taken")
    GLib.MainLoop().run()


if __name__ == "__main__":
    main(sys.argv[1:])

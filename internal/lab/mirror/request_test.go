package mirror

import (
	"net/url"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	hex := strings.Repeat("0123456789abcdef", 4)
	for _, test := range []struct {
		path, ns string
		want     request
		location string
	}{
		{
			"/v2/library/nginx/manifests/1.27", "docker.io",
			request{registry: "docker.io", name: "library/nginx", kind: "manifests", tag: "1.27"},
			"https://registry-1.docker.io/v2/library/nginx/manifests/1.27",
		},
		{
			"/v2/library/nginx/blobs/sha256:" + hex, "docker.io",
			request{registry: "docker.io", name: "library/nginx", kind: "blobs", digest: hex},
			"https://registry-1.docker.io/v2/library/nginx/blobs/sha256:" + hex,
		},
		{
			"/v2/a/b/c_d/e__f-g.h/manifests/sha256:" + hex, "quay.io",
			request{registry: "quay.io", name: "a/b/c_d/e__f-g.h", kind: "manifests", digest: hex},
			"https://quay.io/v2/a/b/c_d/e__f-g.h/manifests/sha256:" + hex,
		},
		{
			"/v2/manifests/blobs/manifests/blobs", "example.com:8443",
			request{registry: "example.com:8443", name: "manifests/blobs", kind: "manifests", tag: "blobs"},
			"https://example.com:8443/v2/manifests/blobs/manifests/blobs",
		},
		{"/v2/x/manifests/1", "localhost:5000", request{registry: "localhost:5000", name: "x", kind: "manifests", tag: "1"}, "http://localhost:5000/v2/x/manifests/1"},
		{"/v2/x/manifests/1", "[::1]:5000", request{registry: "[::1]:5000", name: "x", kind: "manifests", tag: "1"}, "http://[::1]:5000/v2/x/manifests/1"},
		{"/v2/x/manifests/1", "192.0.2.1:5000", request{registry: "192.0.2.1:5000", name: "x", kind: "manifests", tag: "1"}, "https://192.0.2.1:5000/v2/x/manifests/1"},
		{"/v2/x/manifests/1", "", request{name: "x", kind: "manifests", tag: "1"}, ""},
	} {
		got, err := parse(test.path, test.ns)
		if err != nil || got != test.want {
			t.Errorf("parse(%q, %q) = %+v, %v; want %+v", test.path, test.ns, got, err, test.want)
		}
		if test.location != "" && got.location() != test.location {
			t.Errorf("%s of %s is at %s, want %s", test.path, test.ns, got.location(), test.location)
		}
	}
	for _, test := range []struct{ path, ns string }{
		{"", ""}, {"/", ""}, {"/v2/", ""}, {"/v2/x", ""}, {"/v1/x/manifests/1", ""},
		{"/v2/manifests/1", ""},
		{"/v2/x/tags/list", ""},
		{"/v2/x/manifests/", ""},
		{"/v2/x/blobs/1", ""},
		{"/v2/x/blobs/sha256:" + hex[1:], ""},
		{"/v2/x/blobs/sha256:" + strings.ToUpper(hex), ""},
		{"/v2/x/blobs/sha512:" + hex + hex, ""},
		{"/v2/x/manifests/-1", ""},
		{"/v2/x/manifests/" + strings.Repeat("1", 129), ""},
		{"/v2/X/manifests/1", ""},
		{"/v2/../manifests/1", ""},
		{"/v2/a/../b/manifests/1", ""},
		{"/v2/a//b/manifests/1", ""},
		{"/v2/a/b/manifests/..", ""},
		{"/v2/" + strings.Repeat("a", 256) + "/manifests/1", ""},
		{"/v2/" + strings.Repeat("a", 250) + "/manifests/1", "docker.io"},
		{"/v2/x/manifests/1", "a b"}, {"/v2/x/manifests/1", "a/b"}, {"/v2/x/manifests/1", "a@b"}, {"/v2/x/manifests/1", "a:b"},
		{"/v2/x/manifests/1", "a:70000"}, {"/v2/x/manifests/1", "-a"}, {"/v2/x/manifests/1", "fe80::1%eth0"}, {"/v2/x/manifests/1", "[::1"},
	} {
		if got, err := parse(test.path, test.ns); err == nil {
			t.Errorf("parse(%q, %q) = %+v, want an error", test.path, test.ns, got)
		}
	}
}

// FuzzParse holds that what is parsed names one file of the content store, and one URL of the registry that was named.
func FuzzParse(f *testing.F) {
	hex := strings.Repeat("0123456789abcdef", 4)
	for _, seed := range []string{
		"/v2/library/nginx/manifests/1.27", "/v2/a/b/manifests/sha256:" + hex, "/v2/a/blobs/sha256:" + hex, "/v2/", "/v2/a/../b/manifests/1", "/v2/a%2fb/manifests/1",
	} {
		for _, ns := range []string{"docker.io", "localhost:5000", "[::1]:5000", "192.0.2.1", "", "a/b"} {
			f.Add(seed, ns)
		}
	}
	f.Fuzz(func(t *testing.T, path, ns string) {
		r, err := parse(path, ns)
		if err != nil {
			if r != (request{}) {
				t.Errorf("parse(%q, %q) = %+v with the error %v", path, ns, r, err)
			}
			return
		}
		if (r.tag == "") == (r.digest == "") {
			t.Errorf("parse(%q, %q) has the tag %q and the digest %q", path, ns, r.tag, r.digest)
		}
		if r.digest != "" && (len(r.digest) != 64 || strings.Trim(r.digest, "0123456789abcdef") != "") {
			t.Errorf("parse(%q, %q) has the digest %q", path, ns, r.digest)
		}
		if ns == "" {
			return
		}
		u, err := url.Parse(r.location())
		if err != nil {
			t.Fatalf("parse(%q, %q) is at %q: %v", path, ns, r.location(), err)
		}
		if u.Path != path || u.RawQuery != "" || u.User != nil || u.Fragment != "" {
			t.Errorf("parse(%q, %q) is at %q", path, ns, r.location())
		}
		if want := strings.ToLower(strings.TrimSuffix(ns, ":443")); ns != "docker.io" && strings.Trim(strings.ToLower(u.Host), "[]") != strings.Trim(want, "[]") {
			t.Errorf("parse(%q, %q) is at the host %q", path, ns, u.Host)
		}
	})
}

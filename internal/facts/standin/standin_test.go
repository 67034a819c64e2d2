package standin

import (
	"slices"
	"strings"
	"testing"
)

func TestFor(t *testing.T) {
	for _, test := range []struct{ repository, want string }{
		{"docker.io/library/busybox", "busybox"},
		{"public.ecr.aws/docker/library/busybox", "busybox"},
		{"mirror.gcr.io/library/alpine", "alpine"},
		{"mirror.gcr.io/curlimages/curl", "curl"},
		{"k8s.gcr.io/e2e-test-images/agnhost", "agnhost"},
		{"gcr.io/google_containers/busybox", "busybox"},
		{"docker.io/nicolaka/netshoot", "toolbox"},
		{"docker.io/somebody/busybox", ""},
		{"quay.io/library/busybox", ""},
		{"docker.io/library/busybox/more", ""},
		{"", ""},
	} {
		if got, ok := For(test.repository); got != test.want || ok != (test.want != "") {
			t.Errorf("For(%q) = %q, %v; want %q", test.repository, got, ok, test.want)
		}
	}
}

func TestNames(t *testing.T) {
	seen := map[string]string{}
	for _, name := range Names() {
		if !Of([]string{"docker.io/library/x:1", Image(name)}) || Of([]string{"docker.io/library/" + name + ":1"}) {
			t.Errorf("%s: Of goes by something else than the name of a stand-in", name)
		}
		all := Repositories(name)
		if len(all) == 0 || !slices.IsSorted(all) {
			t.Errorf("%s: repositories %q, want some, sorted", name, all)
		}
		for _, r := range all {
			if other := seen[r]; other != "" {
				t.Errorf("%s is of %s and of %s", r, other, name)
			}
			seen[r] = name
			if got, ok := For(r); !ok || got != name {
				t.Errorf("For(%q) = %q, want %q", r, got, name)
			}
			if host, _, _ := strings.Cut(r, "/"); !strings.Contains(host, ".") || IsLocal(r) {
				t.Errorf("%s is no full name of a repository of a registry", r)
			}
		}
	}
}

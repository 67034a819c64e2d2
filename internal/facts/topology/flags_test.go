package topology

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
)

const labOfFlags = `apiVersion: fathom.network/v1alpha1
kind: Lab
defaults:
  apiServerArgs: {service-account-issuer: [https://old, https://older], audit-policy-file: /etc/extra/audit.yaml}
  apiServerVolumes:
  - {hostPath: extra, mountPath: /etc/extra, readOnly: true}
  - {hostPath: ../shared/oidc.crt, mountPath: /etc/oidc.crt}
clusters:
- name: east
  apiServerArgs: {service-account-issuer: [https://new, https://old], oidc-required-claim: [a=1, b=2], enable-admission-plugins: NodeRestriction}
  mounts:
  - {hostPath: /srv/data}
- name: west
  apiServerVolumes:
  - {hostPath: /srv/west, mountPath: /etc/extra}
`

func TestFlagsAndVolumes(t *testing.T) {
	lab, err := Parse([]byte(labOfFlags), "lab.yaml", Overrides{Dir: "/home/me/labs"})
	if err != nil {
		t.Fatal(err)
	}
	east, west := lab.Clusters[0], lab.Clusters[1]
	if got, want := east.APIServerArgs, (map[string]Values{
		"service-account-issuer": {"https://new", "https://old"}, "oidc-required-claim": {"a=1", "b=2"},
		"enable-admission-plugins": {"NodeRestriction"}, "audit-policy-file": {"/etc/extra/audit.yaml"},
	}); !reflect.DeepEqual(got, want) {
		t.Errorf("east has the flags %v, want %v", got, want)
	}
	if got, want := east.APIServerVolumes, []Volume{{"/home/me/labs/extra", "/etc/extra", true}, {"/home/me/shared/oidc.crt", "/etc/oidc.crt", false}}; !reflect.DeepEqual(got, want) {
		t.Errorf("east has the volumes %v, want %v", got, want)
	}
	if got, want := west.APIServerVolumes, []Volume{{"/home/me/shared/oidc.crt", "/etc/oidc.crt", false}, {"/srv/west", "/etc/extra", false}}; !reflect.DeepEqual(got, want) {
		t.Errorf("west has the volumes %v, want %v", got, want)
	}

	// What a lab file needs of the host, each once, whatever the number of clusters and nodes.
	err = lab.CheckHostPaths(func(path string) error {
		if path == "/home/me/shared/oidc.crt" {
			return nil
		}
		return errors.New("it is not there: " + path)
	})
	const missing = `the lab has 3 problems:
  lab.yaml:6:16: defaults.apiServerVolumes[0].hostPath: "extra": it is not there: /home/me/labs/extra
  lab.yaml:12:16: clusters[0].mounts[0].hostPath: "/srv/data": it is not there: /srv/data
  lab.yaml:15:16: clusters[1].apiServerVolumes[0].hostPath: "/srv/west": it is not there: /srv/west`
	if !IsInvalid(err) || err.Error() != missing {
		t.Errorf("got\n%v\nwant\n%s", err, missing)
	}
	if err := lab.CheckHostPaths(func(string) error { return nil }); err != nil {
		t.Errorf("all is there: %v", err)
	}
}

// A record of a lab is read by the version that wrote it, and one of a version whose flags had a single value each, too.
func TestValues(t *testing.T) {
	for text, want := range map[string]Values{`"a"`: {"a"}, `["a","b"]`: {"a", "b"}, `[]`: {}, `""`: {""}} {
		var got Values
		if err := json.Unmarshal([]byte(text), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %q, %v; want %q", text, got, err, want)
		}
		if again, err := json.Marshal(got); err != nil || string(again) != text {
			t.Errorf("%s is written %s, %v", text, again, err)
		}
	}
	for _, bad := range []string{`1`, `{"a":"b"}`, `[1]`} {
		if err := json.Unmarshal([]byte(bad), new(Values)); err == nil {
			t.Errorf("%s gives no error", bad)
		}
	}
}

// A reason says what to do or why not, in words that end the sentence.
func TestFlagReasons(t *testing.T) {
	for c, all := range flags {
		for name, reason := range all {
			if !flagName.MatchString(name) || strings.HasSuffix(reason, ".") {
				t.Errorf("%s: %q: %q", c, name, reason)
			}
		}
	}
	if reason, known := Flag(APIServer, "v"); known || reason != "" {
		t.Errorf("a flag that the lab has no say in: %q, %v", reason, known)
	}
	if reason, known := Flag(APIServer, "authorization-mode"); !known || reason != "" {
		t.Errorf("a flag of the lab's that may be set: %q, %v", reason, known)
	}
}

// Package stored has what a cluster keeps on its disks: the keys of etcd, and the files of its control-plane nodes. It reads them, and changes
// in them what a cluster has for itself alone: addresses, keys and certificates.
//
// The package turns values into values: it asks no cluster and makes no file.
package stored

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

// State is what an etcd holds, in the form that `kube etcd-state` reads and writes, and etcdctl with -w json.
type State struct {
	KVs []KV `json:"kvs"`
}

// KV is a key with its value.
type KV struct {
	Key   []byte `json:"key"`
	Value []byte `json:"value"`
}

// Registry is what the API server's keys begin with (--etcd-prefix).
const Registry = "/registry/"

// Add gives the state an object that has just been made.
func (s *State) Add(path string, object runtime.Object) error {
	value, err := kube.EncodeStored(object)
	if err != nil {
		return fmt.Errorf("%s%s: %w", Registry, path, err)
	}
	s.KVs = append(s.KVs, KV{[]byte(Registry + path), value})
	return nil
}

// AddSecret gives the state a Secret that has just been made.
func (s *State) AddSecret(secret *corev1.Secret, now time.Time) error {
	secret.UID, secret.CreationTimestamp = types.UID(uuid.NewUUID()), metav1.NewTime(now)
	return s.Add("secrets/"+secret.Namespace+"/"+secret.Name, secret)
}

// Identity is what a cluster has for itself alone and its objects tell.
type Identity struct {
	Underlay4, Underlay6 netip.Prefix
	// Public are texts, by name, such as the certificates of authorities, which are the same wherever they stand.
	Public map[string]string
}

// Underlays are the ranges of nodes' addresses, IPv4's first.
func (id Identity) Underlays() []netip.Prefix { return []netip.Prefix{id.Underlay4, id.Underlay6} }

// marks pairs each public text with the mark that stands for it in a template, also as base64, which kubeconfigs have it in.
func (id Identity) marks() (pairs [][2]string) {
	for name, text := range id.Public {
		text = strings.TrimSpace(text)
		pairs = append(pairs,
			[2]string{text, "{{fathom " + name + "}}"},
			[2]string{base64.StdEncoding.EncodeToString([]byte(text + "\n")), "{{fathom base64 " + name + "}}"})
	}
	return pairs
}

// Mark returns what puts marks in the place of the public texts, and Unmark what puts the texts in the place of their marks.
func (id Identity) Mark() func(string) string { return replacer(id.marks(), 0, 1) }

// Unmark undoes Mark, with texts that may be others.
func (id Identity) Unmark() func(string) string { return replacer(id.marks(), 1, 0) }

// Move returns what puts the texts and addresses of another identity in the place of those of id.
func (id Identity) Move(to Identity) func(string) string {
	own, others := map[string]string{}, map[string]string{}
	for _, p := range id.marks() {
		own[p[1]] = p[0]
	}
	for _, p := range to.marks() {
		others[p[1]] = p[0]
	}
	var list []string
	for mark, text := range own {
		if other, ok := others[mark]; ok {
			list = append(list, text, other)
		}
	}
	texts := strings.NewReplacer(list...)
	return func(s string) string {
		return MoveAddresses(texts.Replace(s), id.Underlays(), to.Underlays())
	}
}

func replacer(pairs [][2]string, from, to int) func(string) string {
	var list []string
	for _, p := range pairs {
		list = append(list, p[from], p[to])
	}
	return strings.NewReplacer(list...).Replace
}

// secret are texts that keys, certificates and tokens have, also in base64.
var secret = []string{"PRIVATE KEY", "-----BEGIN ", "LS0tLS1CRUdJTi", "eyJhbGciOi"}

// inBase64 is what may be a key or a certificate in base64.
var inBase64 = regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/]*`)

// HoldsKey says whether the text has a private key or a token in it, as far as one can tell. Certificates are neither.
func HoldsKey(text []byte) bool {
	if bytes.Contains(text, []byte("PRIVATE KEY-----")) || jwt.Match(text) {
		return true
	}
	for _, found := range inBase64.FindAll(text, -1) {
		head := found[:min(len(found), 64)]
		head = head[:len(head)/4*4]
		if data, err := base64.StdEncoding.DecodeString(string(head)); err == nil && bytes.Contains(data, []byte("PRIVATE KEY")) {
			return true
		}
	}
	return false
}

// jwt is a JSON Web Token (RFC 7519): a header in base64, which begins with `{"alg":` or `{"typ":`, its claims, and a signature.
var jwt = regexp.MustCompile(`eyJ(hbGciOi|0eXAiOi)[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+`)

// IsSecret says whether the text has a key, a certificate or a token in it, as far as one can tell.
func IsSecret(text []byte) bool {
	for _, s := range secret {
		if bytes.Contains(text, []byte(s)) {
			return true
		}
	}
	return false
}

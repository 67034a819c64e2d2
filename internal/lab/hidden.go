package lab

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// ownDirs are the node's own: what the host has there does not show through, and every node has them. The host's /var, /run
// and /tmp are below mounts of the node, where a pod with privileges could look.
var ownDirs = []string{"etc/cni", "etc/kubernetes", "etc/containerd", "root", "home", "var", "run", "tmp"}

// secretDirs are hidden where the host has them: keys, and passwords of networks.
var secretDirs = []string{
	"etc/ssh", "etc/ssl/private", "etc/pki/tls/private", "etc/letsencrypt", "etc/wireguard", "etc/openvpn", "etc/ipsec.d",
	"etc/NetworkManager/system-connections", "etc/netplan", "etc/rancher", "etc/docker", "srv",
}

// secretFiles are empty files in nodes where the host has them.
var secretFiles = []string{"etc/shadow-", "etc/gshadow-", "etc/krb5.keytab", "etc/ipsec.secrets", "etc/security/opasswd"}

// hiddenDirs are the directories of the host, below root, that nodes do not see. A node's root is an overlay of the
// host's. This keeps the host's secrets from who looks around in a node, a pod with a hostPath volume for example; it is no
// boundary against a privileged one (docs/security.md).
func hiddenDirs(root string, paths Paths) []string {
	hidden := append([]string(nil), ownDirs...)
	for _, dir := range secretDirs {
		if st, err := os.Lstat(filepath.Join(root, dir)); err == nil && st.IsDir() {
			hidden = append(hidden, dir)
		}
	}
	// Wherever it is: the other labs, and the nodes' disks.
	state := paths.State
	if real, err := filepath.EvalSymlinks(state); err == nil {
		state = real
	}
	state = strings.Trim(filepath.Clean(state), "/")
	if state != "" && !slices.ContainsFunc(hidden, func(dir string) bool { return state == dir || strings.HasPrefix(state, dir+"/") }) {
		hidden = append(hidden, state)
	}
	return hidden
}

// hideFiles lays files over those of the host that hold secrets. Accounts are as on the host but for their passwords, of which
// none fits: a shadow file without them would break whatever looks up an account (su, PAM).
func (l *Lab) hideFiles(root, node string) error {
	for _, f := range []struct {
		from, path, rest string
	}{
		{"etc/passwd", "etc/shadow", "*:19000:0:99999:7:::"},
		{"etc/group", "etc/gshadow", "*::"},
	} {
		accounts, err := os.ReadFile(filepath.Join(root, f.from))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := writeFile(l.diskFile(node, "/"+f.path), locked(accounts, f.rest), 0o600); err != nil {
			return err
		}
	}
	for _, path := range secretFiles {
		if _, err := os.Lstat(filepath.Join(root, path)); err != nil {
			continue
		}
		if err := writeFile(l.diskFile(node, "/"+path), nil, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// locked returns a line for each account of a file like passwd(5): its name and the fields of one without a password.
func locked(accounts []byte, rest string) []byte {
	var b bytes.Buffer
	for line := range strings.Lines(string(accounts)) {
		if name, _, found := strings.Cut(line, ":"); found && name != "" && name[0] != '#' && name[0] != '+' && name[0] != '-' {
			b.WriteString(name + ":" + rest + "\n")
		}
	}
	return b.Bytes()
}
